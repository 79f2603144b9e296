"""Hosts: network namespaces with addresses of their own, on one switch. A cable can be pulled.

Each has a loopback, an interface eth0 and a host name. Needs root, and Debian's iproute2.
"""

import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

NEW_UTS = 0x04000000  # of unshare(2): a host name of its own
NETWORK = "10.77.0"


def obstacle() -> str | None:
    """Return why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    if shutil.which("ip") is None:
        return "no ip (Debian's iproute2)"
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

    def command(self, *words: str) -> list[str]:
        """Return the command that runs these words on the host."""
        return ["ip", "netns", "exec", self.namespace, *words]

    def pull_cable(self) -> None:
        ip("-n", self.switch, "link", "set", f"port{self.number}", "down")

    def plug_cable(self) -> None:
        ip("-n", self.switch, "link", "set", f"port{self.number}", "up")


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
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for interface in ("eth0", "lo"):
                ip("-n", host.namespace, "link", "set", interface, "up")
        yield made
    finally:
        for namespace in (*(host.namespace for host in made), switch):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
