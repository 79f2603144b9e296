"""How a deployment hands KV over: the flags, and the endpoint of the transport that they choose."""

from dataclasses import dataclass

import torch

from disagg.handoff.transport import Endpoint
from disagg.handoff.transports.torch_dist import TorchEndpoint

TRANSPORTS = ("torch",)


@dataclass(frozen=True)
class Handoff:
    """The settings of the handoff. Prefill and decode jobs that serve together have the same."""

    transport: str = "torch"

    def as_layout(self) -> dict[str, str]:
        """Return what the router compares between replicas: flag -> value."""
        return {"--transport": self.transport}

    def make_endpoint(self, host: str, page: int, device: torch.device) -> Endpoint:
        """Make this rank's endpoint. `host`: this rank's address; `page`: bytes of a page over all layers."""
        return TorchEndpoint(device)


BY_DEFAULT = Handoff()
