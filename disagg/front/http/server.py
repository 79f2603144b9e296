"""The HTTP door's server: uvicorn and the router's turns in one event loop, in one thread.

    ZeroMQ's descriptor is readable ---+
    a request was submitted, cancelled +--> wake --> router.turn --> the clients' events --> their tasks send
    TURN_S have passed ----------------+

The router stays synchronous: a turn never waits, and nothing else touches it meanwhile.
"""

import asyncio
import contextlib
import os
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvicorn
import uvloop

from disagg.control.address import format_address, is_wildcard, parse_address
from disagg.front.chat_text import ChatFormat
from disagg.front.http.app import make_app
from disagg.front.http.generate import Service
from disagg.front.http.limits import Keys, Timeouts
from disagg.front.http.protocol import IDLE_S, LimitedProtocol
from disagg.front.http.token_text import TokenText
from disagg.front.parse import Served
from disagg.front.router import Router
from parallel.interface import resolve

TURN_S = 0.1  # the longest time between two turns; an idle router costs one turn per TURN_S
FLUSH_S = 5  # how long answers may still be sent at the end
BACKLOG = 4096  # connections that wait to be accepted


class Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take no signal: Ctrl-C stays the router's."""
        yield


class HttpDoor:
    def __init__(self, args: Namespace, served: Served) -> None:
        """Check the flags, and take the port. Connections are accepted in `run`. Raises ValueError."""
        self.served, self.timeouts = served, Timeouts.parse(args.request_timeout)
        self.keys, self.names = Keys.read(args.api_key_file), model_names(args.model_name)
        self.host, port = parse_address("--http", args.http)
        self._sock = bind(self.host, port)
        self.port = self._sock.getsockname()[1]

    def announce(self) -> None:
        where = f"http://{format_address(self.host, self.port)}"
        print(f"router: HTTP at {where}/v1, model {self.names[0]}", file=sys.stderr, flush=True)
        if is_wildcard(self.host) and not self.keys:
            print("router: anybody who reaches that address can use the model: no --api-key-file", file=sys.stderr)

    def run(self, router: Router, stopped: Callable[[], bool]) -> None:
        """Serve until `stopped`, or until the router has drained.

        Requests without an answer then get the error "interrupted".
        """
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve(router, stopped))

    async def _serve(self, router: Router, stopped: Callable[[], bool]) -> None:
        wake = asyncio.Event()
        with ThreadPoolExecutor(1, "encoder") as encoder:
            words = TokenText(self.served.encoder.tokenizer)
            shared = router, self.served, self.names, self.keys, self.timeouts, wake.set, encoder, words
            tokenizer = self.served.encoder.tokenizer
            chat_format = None if tokenizer is None else ChatFormat(tokenizer)
            server = Server(
                uvicorn.Config(
                    make_app(Service(*shared, chat_format)),
                    loop="none",
                    http=LimitedProtocol,
                    ws="none",
                    lifespan="off",
                    log_config=None,
                    log_level="error",
                    access_log=False,
                    proxy_headers=False,
                    server_header=False,
                    backlog=BACKLOG,
                    timeout_keep_alive=IDLE_S,
                    timeout_graceful_shutdown=FLUSH_S,
                )
            )
            serving = asyncio.create_task(server.serve(sockets=[self._sock]))
            try:
                await take_turns(router, wake, lambda: stopped() or router.has_drained or serving.done())
                router.interrupt()
            finally:
                server.should_exit = True
                await self._ended(serving)

    async def _ended(self, serving: asyncio.Task) -> None:
        try:
            await serving
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise ValueError(f"--http: cannot listen on {format_address(self.host, self.port)}: {reason}") from None


async def take_turns(router: Router, wake: asyncio.Event, ended: Callable[[], bool]) -> None:
    """Do the router's turns until `ended`. Between two of them, all other tasks run.

    The descriptor only reports changes, which any use of the socket may consume. So the port is asked before each wait.
    """
    loop = asyncio.get_running_loop()
    loop.add_reader(router.port.descriptor, wake.set)
    try:
        while not ended():
            wake.clear()
            router.turn(None, 0)
            await asyncio.sleep(0)
            if not router.port.has_messages:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TURN_S):
                        await wake.wait()
    finally:
        loop.remove_reader(router.port.descriptor)


def model_names(name: str) -> list[str]:
    """Return the names under which clients may ask for the model. The first is a hub id, or the name of a folder."""
    hub_id, _, _ = name.partition("@")
    if not Path(name).exists():
        return list(dict.fromkeys([hub_id, name, hub_id.rpartition("/")[2]]))
    return list(dict.fromkeys([Path(name).resolve().name, name]))


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that has the address, and does not listen yet. Raises ValueError."""
    try:
        number = resolve(host)
        sock = socket.socket(socket.AF_INET6 if ":" in number else socket.AF_INET)
    except OSError:
        raise ValueError(f"--http: cannot listen on {format_address(host, port)}: no such host") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((number, port))
    except OSError as error:
        sock.close()
        raise ValueError(f"--http: cannot listen on {format_address(host, port)}: {error.strerror}") from None
    return sock
