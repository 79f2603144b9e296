"""Ends TCP connections of other processes, as if something between their two ends had reset them. Linux only."""

import ctypes
import os
import socket
from collections.abc import Callable, Iterator

PIDFD_GETFD = 438  # the number of pidfd_getfd(2), which Python has no function for
_libc = ctypes.CDLL(None, use_errno=True)
Address = tuple[str, int]


def obstacle() -> str | None:
    """Return why connections of a child cannot be cut here, or None."""
    try:
        next(connections(os.getpid()), None)
    except OSError as error:
        return f"pidfd_getfd: {error.strerror}"
    return None


def connections(pid: int) -> Iterator[tuple[socket.socket, Address, Address]]:
    """Yield a process's connected TCP sockets, as copies that are closed afterwards, with their own and peer's address.

    Raises OSError if this process may not have them. Sockets that close meanwhile are left out.
    """
    process = os.pidfd_open(pid)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                if not os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                    continue
            except FileNotFoundError:
                continue
            number = _libc.syscall(PIDFD_GETFD, process, int(name), 0)
            if number < 0:
                code = ctypes.get_errno()
                if code == 9:  # EBADF: it has just been closed
                    continue
                raise OSError(code, os.strerror(code))
            with socket.socket(fileno=number) as sock:
                if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
                    continue
                try:
                    own, peer = sock.getsockname()[:2], sock.getpeername()[:2]
                except OSError:  # it listens, or its peer has gone
                    continue
                yield sock, own, peer
    finally:
        os.close(process)


def cut(pid: int, to: Callable[[Address], bool]) -> int:
    """End the process's connections to peers at these addresses. Returns how many there were."""
    count = 0
    for sock, _, peer in connections(pid):
        if to(peer):
            sock.shutdown(socket.SHUT_RDWR)
            count += 1
    return count


def cut_between(one: int, other: int) -> int:
    """End all connections between two processes. Returns how many there were."""
    ends = {own for _, own, _ in connections(other)}
    return cut(one, ends.__contains__)
