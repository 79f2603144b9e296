"""HOST:PORT: how a user writes an address, and how ZeroMQ expects it. IPv4, IPv6 and host names."""

import os
import socket
from contextlib import suppress

import zmq

from disagg.control.secret import Secret
from parallel.interface import resolve


def parse_address(name: str, address: str) -> tuple[str, int]:
    """Parse the value of the flag `name` into (host, port). An IPv6 host must be in brackets, which are removed.

    Raises ValueError, with the flag and the rule that its value breaks.
    """
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{name} is {address!r}; it must be HOST:PORT, and an IPv6 host in brackets: [::1]:7000")
    if not host or not port.isdecimal() or not port.isascii():
        raise ValueError(f"{name} is {address!r}; it must be HOST:PORT")
    if len(port) > 5 or int(port) > 65535:
        raise ValueError(f"{name} is {address!r}; its port must be in 0..65535")
    return host, int(port)


def format_address(host: str, port: int | str) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_wildcard(host: str) -> bool:
    """Does listening on `host` mean listening on all of this machine's addresses?"""
    return resolve(host) in ("0.0.0.0", "::")


def answers(host: str, port: int) -> bool:
    """Does any process listen on host:port? Waits at most one second for an answer."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def bind(sock: zmq.Socket, host: str, port: int = 0, secret: Secret | None = None) -> int:
    """Bind to host:port (0: any free port), for those who have the secret, or for everybody. Returns the port.

    Raises ValueError if the address cannot be used.
    """
    try:
        number = resolve(host)
        if secret is not None:
            secret.guard(sock)
        sock.setsockopt(zmq.IPV6, ":" in number)
        sock.bind(f"tcp://{format_address(number, port or '*')}")
    except zmq.ZMQError as error:
        assert error.errno is not None  # libzmq sets it for every error
        raise ValueError(f"cannot listen on {format_address(host, port)}: {os.strerror(error.errno)}") from None
    except OSError:
        raise ValueError(f"cannot listen on {format_address(host, port)}: no such host") from None
    return int(sock.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])


def connect_to(sock: zmq.Socket, host: str, port: int, secret: Secret | None = None) -> None:
    """Connect as soon as a process listens there, and reconnect whenever the connection is lost.

    `secret`: what the listener asks for. Returns at once. Raises ValueError if the host cannot be resolved.
    """
    try:
        sock.setsockopt(zmq.IPV6, ":" in resolve(host))
    except OSError as error:
        raise ValueError(f"no way to reach {host!r}: {error.strerror}") from None
    if secret is not None:
        secret.show(sock)
    sock.connect(_endpoint(host, port))  # the name itself: it may resolve to another machine later


def connect_again(sock: zmq.Socket, host: str, port: int) -> None:
    """Connect anew after a handshake that failed: ZeroMQ gives an address up whose process does not speak as expected.

    Another process may listen there later.
    """
    with suppress(zmq.ZMQError):  # it has been given up already
        sock.disconnect(_endpoint(host, port))
    sock.connect(_endpoint(host, port))


def _endpoint(host: str, port: int) -> str:
    return f"tcp://{format_address(host, port)}"
