"""How the two ends of a link meet: decode knocks at the prefill rank's door, which puts up a pipe, and the transport
connects through the store that the prefill rank hosts.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import zmq

from disagg.address import bind, connect_to
from disagg.control import Member, Pipe, new_socket
from disagg.handoff import Cancel, Closed, Knock, Last, Open, Sending
from disagg.transport.torch_dist import TIMEOUT, TorchTransport


def listen(store: dist.Store, host: str, device: torch.device) -> Callable[[str], tuple[Pipe, TorchTransport]]:
    """The prefill end's `connect`: put up a pipe and tell its port through the store that this rank hosts."""

    def connect(key: str) -> tuple[Pipe, TorchTransport]:
        sock = new_socket(zmq.DEALER)
        pipe = Pipe(sock, Open | Cancel, watched=True)
        store.set(f"{key}/pipe", str(bind(sock, host)))
        return pipe, TorchTransport(dist.PrefixStore(key, store), 0, device)

    return connect


def dial(
    prefill: Member, me: Member, device: torch.device, generation: int = 0
) -> Callable[[str], tuple[Pipe, TorchTransport]]:
    """The decode end's `connect`: knock at the prefill rank's door, then meet it in its store."""

    def connect(key: str) -> tuple[Pipe, TorchTransport]:
        door = Pipe(new_socket(zmq.PUSH), Knock)
        connect_to(door.sock, prefill.host, prefill.door)
        door.send(Knock(me, generation))
        door.close()
        store = dist.TCPStore(prefill.host, prefill.store, is_master=False, timeout=TIMEOUT)
        pipe = Pipe(new_socket(zmq.DEALER), Sending | Last | Closed, watched=True)
        connect_to(pipe.sock, prefill.host, int(store.get(f"{key}/pipe")))
        return pipe, TorchTransport(dist.PrefixStore(key, store), 1, device)

    return connect


def link_key(prefill: Member, decode: Member, generation: int = 0) -> str:
    return f"{prefill.id}/{decode.id}/{generation}"
