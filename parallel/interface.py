"""Hosts, addresses and interfaces of this machine. Gloo and NCCL are told where to listen by an interface's name."""

import fcntl
import socket
import struct
from pathlib import Path

LOOPBACK = "127.0.0.1"
SIOCGIFADDR = 0x8915  # the IPv4 address of an interface (man netdevice)


def resolve(host: str) -> str:
    """Resolve a host to a numeric address. If a name has several, IPv4 is preferred. Raises OSError if it has none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError:  # not a valid name: a label is empty or too long
        raise OSError(socket.EAI_NONAME, "Name or service not known") from None
    return str(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0])


def local_host(towards: str) -> str:
    """Return this machine's address as seen from `towards`: the source address of a packet sent there.

    Raises ValueError if there is no route.
    """
    try:
        number = resolve(towards)
        family = socket.AF_INET6 if ":" in number else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((number, 9))  # a datagram socket: this sends nothing
            return probe.getsockname()[0]
    except OSError as error:
        raise ValueError(f"no way to reach {towards!r}: {error.strerror}") from None


def interface_of(address: str) -> str | None:
    """Return the name of this machine's interface that has the numeric IPv4 or IPv6 address; None if none has it."""
    return next((name for _, name in socket.if_nameindex() if address in _addresses(name)), None)


def _addresses(interface: str) -> list[str]:
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            packed = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
            found.append(socket.inet_ntoa(packed[20:24]))
        except OSError:  # it has none
            pass
    table = Path("/proc/net/if_inet6")  # Linux; a line has an address in hexadecimal digits first, and a name last
    for line in table.read_text().splitlines() if table.exists() else []:
        digits, *_, name = line.split()
        if name == interface:
            found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return found
