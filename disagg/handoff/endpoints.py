"""How a deployment hands KV over: the flags, and the endpoint of the transport that they choose."""

from dataclasses import dataclass

import torch
from torch import Tensor

from disagg.handoff.transport import Endpoint
from disagg.handoff.transports import mooncake_tcp, nixl_ucx
from disagg.handoff.transports.mooncake_tcp import MooncakeEndpoint
from disagg.handoff.transports.nixl_ucx import NixlEndpoint
from disagg.handoff.transports.torch_dist import TorchEndpoint

TRANSPORTS = ("torch", "nixl", "mooncake")


@dataclass(frozen=True)
class Handoff:
    """The settings of the handoff. Prefill and decode jobs that serve together have the same."""

    transport: str = "torch"
    checksums: bool = False

    def as_layout(self) -> dict[str, str]:
        """Return what the router compares between replicas: flag -> value."""
        return {"--transport": self.transport, "--kv-checksum": "on" if self.checksums else "off"}

    def check(self, device: torch.device) -> None:
        """Raise ValueError if the transport's library cannot be used, before the weights are read in vain."""
        match self.transport:
            case "nixl":
                nixl_ucx.load(device)
            case "mooncake":
                mooncake_tcp.load(device)

    def make_endpoint(self, host: str, pool: Tensor) -> Endpoint:
        """Make this rank's endpoint, for pages of `pool` [layers, pages, ..]. `host`: this rank's address.

        Raises ValueError if the library cannot be used.
        """
        match self.transport:
            case "nixl":
                return NixlEndpoint(pool)
            case "mooncake":
                return MooncakeEndpoint(host, pool)
        return TorchEndpoint(pool.device, host)


BY_DEFAULT = Handoff()
