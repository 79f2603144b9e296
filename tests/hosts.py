"""Hosts: network namespaces with addresses of their own, on one switch. A cable can be pulled, or connections stall.

Each has a loopback, an interface eth0 and a host name. Needs root, and Debian's iproute2.
"""

import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
NEW_UTS = 0x04000000  # of unshare(2): a host name of its own
NEW_NET = 0x40000000  # of setns(2)
NETWORK = "10.77.0"
NO_NAMES = {"RES_OPTIONS": "timeout:1 attempts:1"}  # an environment: torch asks for names, and no host knows any
OPCODES = {  # of classic BPF (linux/filter.h); A is its accumulator, X its index
    "load word": 0x20,
    "load half": 0x28,
    "load byte": 0x30,
    "load half at X": 0x48,
    "load byte at X": 0x50,
    "load kept": 0x60,
    "X = IP header": 0xB1,
    "X =": 0x07,
    "keep": 0x02,
    "minus X": 0x1C,
    "and": 0x54,
    "shift right": 0x74,
    "equal": 0x15,
    "greater than X": 0x2D,
    "return": 0x06,
}


def obstacle() -> str | None:
    """Return why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "no ip or tc (Debian's iproute2)"
    probe = f"moesaic{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"ip netns add: {made.stderr.strip()}"
    ip("netns", "del", probe)
    return None


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class Host:
    namespace: str
    switch: str
    number: int

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number + 1}"

    def __call__(self) -> None:
        """Move this process, which has one thread, to the host."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.namespace}") as namespace:
            done = libc.setns(namespace.fileno(), 0) == 0 and libc.unshare(NEW_UTS) == 0
        if not done:
            raise OSError(ctypes.get_errno(), f"cannot enter {self.namespace}")
        socket.sethostname(self.namespace)

    def run(self, work: Callable[[], T]) -> T:
        """Do some work in a thread that is on the host. Its sockets stay there."""

        def enter_and_work() -> T:
            with open(f"/run/netns/{self.namespace}") as namespace:
                if ctypes.CDLL(None).setns(namespace.fileno(), NEW_NET):
                    raise OSError(f"cannot enter {self.namespace}")
            return work()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(enter_and_work).result()

    def pull_cable(self) -> None:
        ip("-n", self.switch, "link", "set", f"port{self.number}", "down")

    def plug_cable(self) -> None:
        ip("-n", self.switch, "link", "set", f"port{self.number}", "up")

    def stall(self, other: "Host", but: Sequence[int] = ()) -> None:
        """Let no data pass between the two hosts, as behind a proxy that accepts, and then forwards nothing.

        Connections stand, and new ones are accepted. What is sent may still be acknowledged, never arrives, and is sent
        again once they `flow`. `but`: ports whose connections go on.
        """
        program = _drop_data(socket.inet_aton(other.address), but)
        for direction in ("egress", "ingress"):
            self._tc("filter", "add", direction, "bpf", "da", "bytecode", program)

    def flow(self) -> None:
        for direction in ("egress", "ingress"):
            self._tc("filter", "del", direction)

    def _tc(self, what: str, do: str, *words: str) -> None:
        device = "dev", f"port{self.number}"
        command = ["tc", "-n", self.switch, what, do, *device, *words]
        subprocess.run(command, check=True, capture_output=True, text=True)


def _drop_data(address: bytes, but: Sequence[int]) -> str:
    """Return the program, in classic BPF, that drops TCP segments with data, from or to an IPv4 address."""
    number, code = int.from_bytes(address, "big"), []  # instructions: opcode, label if true, label if false, constant
    code += [
        ("load half", "", "", 12),
        ("equal", "", "pass", 0x0800),
        ("load byte", "", "", 23),
        ("equal", "", "pass", 6),
    ]
    code += [("load word", "", "", 26), ("equal", "theirs", "", number)]  # the source, and then the destination
    code += [("load word", "", "", 30), ("equal", "theirs", "pass", number), ("theirs:", "", "", 0)]
    code += [("X = IP header", "", "", 14)]
    for at in (14, 16):  # the ports
        code += [("load half at X", "", "", at), *(("equal", "pass", "", port) for port in but)]
    code += [("load half", "", "", 16), ("minus X", "", "", 0), ("keep", "", "", 0)]  # bytes of the TCP segment
    code += [("load byte at X", "", "", 26), ("and", "", "", 0xF0), ("shift right", "", "", 2), ("X =", "", "", 0)]
    code += [("load kept", "", "", 0), ("greater than X", "drop", "pass", 0)]  # than its header
    code += [("pass:", "", "", 0), ("return", "", "", 0), ("drop:", "", "", 0), ("return", "", "", 2)]
    places: dict[str, int] = {}
    for row in code:
        if row[0].endswith(":"):
            places[row[0][:-1]] = sum(not other[0].endswith(":") for other in code[: code.index(row)])
    rows = [row for row in code if not row[0].endswith(":")]
    jumps = [[places[label] - i - 1 if label else 0 for label in row[1:3]] for i, row in enumerate(rows)]
    lines = [f"{OPCODES[row[0]]} {yes} {no} {row[3]}" for row, (yes, no) in zip(rows, jumps, strict=True)]
    return f"{len(lines)},{','.join(lines)},"


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Yield so many hosts, and remove them."""
    switch = f"moe{os.getpid()}s"
    made = [Host(f"moe{os.getpid()}h{i}", switch, i) for i in range(count)]
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for host in made:
            port = f"port{host.number}"
            ip("netns", "add", host.namespace)
            ip("link", "add", "eth0", "netns", host.namespace, "type", "veth", "peer", "name", port, "netns", switch)
            ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            subprocess.run(["tc", "-n", switch, "qdisc", "add", "dev", port, "clsact"], check=True, capture_output=True)
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for interface in ("eth0", "lo"):
                ip("-n", host.namespace, "link", "set", interface, "up")
        yield made
    finally:
        for namespace in (*(host.namespace for host in made), switch):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
