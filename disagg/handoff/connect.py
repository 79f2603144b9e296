"""How the two ends of a link meet: decode knocks at the prefill rank's door, which puts up a pipe, and the transport
connects through the store that the prefill rank hosts.
"""

import datetime
import socket
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import zmq

from disagg.control.address import bind, connect_to, resolve
from disagg.control.messages import Decoder, Member, encode
from disagg.control.ports import MOST_POLLED, new_socket
from disagg.handoff.pipe import Pipe
from disagg.handoff.protocol import Cancel, Closed, Knock, Last, Open, Sending
from disagg.handoff.transports.torch_dist import TIMEOUT, TorchTransport

KNOCK_AGAIN = datetime.timedelta(seconds=3)


class Door:
    """Where decode ranks knock: the two ports that they need to make a link with this prefill rank."""

    def __init__(self, host: str):
        self.host, self._decode = host, Decoder(Knock)
        number = resolve(host)
        # torch would listen on all of this machine's addresses.
        self._listener = socket.create_server((number, 0), family=socket.AF_INET6 if ":" in number else socket.AF_INET)
        port = self._listener.getsockname()[1]
        self.store = dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=self._listener.detach()
        )
        self._sock = new_socket(zmq.PULL)
        self.port = bind(self._sock, host)

    def poll(self, timeout_ms: int = 0) -> list[Knock]:
        """Who has knocked, waiting up to `timeout_ms` for the first. Anything else is a stranger's, and dropped."""
        knocks = []
        while len(knocks) < MOST_POLLED and self._sock.poll(0 if knocks else timeout_ms):
            body = self._sock.recv()
            try:
                knocks.append(self._decode(body))
            except ValueError:
                continue
        return knocks

    def close(self) -> None:
        self._sock.close()


def listen(store: dist.TCPStore, host: str, device: torch.device) -> Callable[[str], tuple[Pipe, TorchTransport]]:
    """The prefill end's `connect`: put up a pipe and tell its port through the store that this rank hosts."""

    def connect(key: str) -> tuple[Pipe, TorchTransport]:
        pipe = Pipe.listen(host, key, Open | Cancel)
        # A client of its own: while one waits, for a peer that is frozen perhaps, nobody else can use it.
        mine = dist.TCPStore(host, store.port, is_master=False, timeout=TIMEOUT)
        mine.set(f"{key}/pipe", str(pipe.port))
        return pipe, TorchTransport(dist.PrefixStore(key, mine), 0, device)

    return connect


def dial(
    prefill: Member, me: Member, device: torch.device, generation: int = 0
) -> Callable[[str], tuple[Pipe, TorchTransport]]:
    """The decode end's `connect`: knock at the prefill rank's door, then meet it in its store."""

    def connect(key: str) -> tuple[Pipe, TorchTransport]:
        store = dist.TCPStore(prefill.host, prefill.store, is_master=False, timeout=TIMEOUT)
        port = int(_knock(prefill, Knock(me, generation), store, f"{key}/pipe"))
        pipe = Pipe.connect(prefill.host, port, key, Sending | Last | Closed)
        return pipe, TorchTransport(dist.PrefixStore(key, store), 1, device)

    return connect


def _knock(prefill: Member, knock: Knock, store: dist.Store, answer: str) -> bytes:
    """Knock until the prefill rank has opened, which it says under the key `answer`. RuntimeError if it never does."""
    door, deadline = new_socket(zmq.PUSH), time.monotonic() + TIMEOUT.total_seconds()
    door.setsockopt(zmq.LINGER, 0)
    connect_to(door, prefill.host, prefill.door)
    try:
        while True:
            door.send(encode(knock))  # again and again: one may be lost, or come when there are too many links
            try:
                store.wait([answer], KNOCK_AGAIN)
                return store.get(answer)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
    finally:
        door.close()


def link_key(prefill: Member, decode: Member, generation: int = 0) -> str:
    return f"{prefill.id}/{decode.id}/{generation}"
