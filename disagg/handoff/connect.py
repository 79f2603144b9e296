"""How the two ends of a link meet.

The decode rank knocks at the prefill rank's door. The prefill rank then opens a pipe for it and puts the pipe's port
into its store. The transport connects through the same store.
"""

import datetime
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import zmq

# Public by torch's documentation, though not by its __init__.py, which has no __all__.
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from disagg.control.address import bind, connect_to
from disagg.control.messages import Decoder, Member, encode
from disagg.control.ports import MOST_POLLED, new_socket, unwatch, watch
from disagg.control.refusals import FAILED, Refusals
from disagg.control.secret import Secret
from disagg.handoff.pipe import Pipe, closed_on_error
from disagg.handoff.protocol import Cancel, Chosen, Closed, Knock, Last, Open, Read, Scored, Sending
from disagg.handoff.transport import TIMEOUT, Endpoint, Transport
from parallel.interface import resolve

KNOCK_AGAIN = datetime.timedelta(seconds=3)


class Door:
    """Where decode ranks knock: the two ports that they need to make a link with this prefill rank.

    Keep it while its links live, because its store ends with it.
    """

    def __init__(self, host: str, secret: Secret | None = None) -> None:
        """`secret`: what decode ranks must have, here and at the links."""
        self.host, self.secret = host, secret
        self.refusals, self.link_refusals = Refusals("prefill: at the door"), Refusals("prefill: at a link")
        self._decode = Decoder[Knock](Knock)
        number = resolve(host)
        # A listener of its own, because torch's would listen on all of this machine's addresses.
        self._listener = socket.create_server((number, 0), family=socket.AF_INET6 if ":" in number else socket.AF_INET)
        port = self._listener.getsockname()[1]
        self.store = TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=self._listener.detach()
        )
        self._sock = new_socket(zmq.PULL)
        self._monitor = watch(self._sock, FAILED)
        self.port = bind(self._sock, host, 0, secret)

    def poll(self, timeout_ms: int = 0) -> list[Knock]:
        """Return the knocks, after waiting up to `timeout_ms` for the first. Everything else is refused."""
        self.refusals.add_failed(self._monitor)
        knocks = []
        while len(knocks) < MOST_POLLED and self._sock.poll(0 if knocks else timeout_ms):
            body = self._sock.recv()
            try:
                knocks.append(self._decode(body))
            except ValueError as error:
                self.refusals.add("a message that is no knock", str(error))
        return knocks

    def close(self) -> None:
        unwatch(self._sock, self._monitor)
        self._sock.close()


def listen(
    store_port: int,
    host: str,
    endpoint: Endpoint,
    secret: Secret | None = None,
    refusals: Refusals | None = None,
) -> Callable[[str], tuple[Pipe, Transport]]:
    """Return the prefill end's `connect`: open a pipe, and put its port into the store that this rank hosts."""

    def connect(key: str) -> tuple[Pipe, Transport]:
        with closed_on_error(Pipe.listen(host, key, Open | Cancel | Read, secret, refusals)) as pipe:
            # One client per link: while a client waits, perhaps for a frozen peer, no other link could use it.
            store = TCPStore(host, store_port, is_master=False, timeout=TIMEOUT)
            store.set(f"{key}/pipe", str(pipe.port))
            return pipe, endpoint.connect(PrefixStore(key, store), 0)

    return connect


def dial(
    prefill: Member, me: Member, endpoint: Endpoint, generation: int = 0, secret: Secret | None = None
) -> Callable[[str], tuple[Pipe, Transport]]:
    """Return the decode end's `connect`: knock at the prefill rank's door, then meet it in its store."""

    def connect(key: str) -> tuple[Pipe, Transport]:
        store = TCPStore(prefill.host, prefill.store, is_master=False, timeout=TIMEOUT)
        port = int(_knock(prefill, Knock(me, generation), store, f"{key}/pipe", secret))
        with closed_on_error(
            Pipe.connect(prefill.host, port, key, Sending | Chosen | Scored | Last | Closed, secret)
        ) as pipe:
            transport = endpoint.connect(PrefixStore(key, store), 1)
        where = f"prefill rank {prefill.rank} at {prefill.host}"
        print(f"decode: a link to {where}: {endpoint.about}", file=sys.stderr, flush=True)
        return pipe, transport

    return connect


def _knock(prefill: Member, knock: Knock, store: Store, answer: str, secret: Secret | None) -> bytes:
    """Knock until the prefill rank has put a value under the key `answer`, and return the value.

    Raises RuntimeError if it does not within TIMEOUT.
    """
    door, deadline = new_socket(zmq.PUSH), time.monotonic() + TIMEOUT.total_seconds()
    door.setsockopt(zmq.LINGER, 0)
    connect_to(door, prefill.host, prefill.door, secret)
    try:
        while True:
            # Repeatedly: a knock may be lost, or be refused because there are too many links. Without waiting, because
            # ZeroMQ gives up a door that does not speak as expected.
            with suppress(zmq.Again):
                door.send(encode(knock), zmq.DONTWAIT)
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
