"""Addresses: the forms that a user may write, and that sockets connect through them over IPv4, IPv6 and by name."""

import socket
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist
import zmq

from disagg.control import address as module
from disagg.control.address import bind, connect_to, format_address, is_wildcard, parse_address
from disagg.control.ports import new_socket
from parallel.interface import local_host, resolve
from tests.conftest import has_ipv6

V4, V6 = "127.0.0.1", "::1"
SOON_MS = 10_000


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
HOSTS = [V4, "localhost", pytest.param(V6, marks=needs_ipv6)]


@pytest.fixture
def new() -> Iterator[Callable[[int], zmq.Socket]]:
    made: list[zmq.Socket] = []

    def make(kind: int) -> zmq.Socket:
        made.append(new_socket(kind))
        return made[-1]

    yield make
    for sock in made:
        sock.close(linger=0)


@pytest.mark.parametrize(
    "address, parsed",
    (
        ("127.0.0.1:7000", ("127.0.0.1", 7000)),
        ("node-3.cluster:65535", ("node-3.cluster", 65535)),
        ("h:0", ("h", 0)),
        ("[::1]:7000", ("::1", 7000)),
        ("[fe80::1%eth0]:0", ("fe80::1%eth0", 0)),
    ),
)
def test_an_address_is_a_host_and_a_port(address: str, parsed: tuple[str, int]) -> None:
    assert parse_address("--router", address) == parsed
    assert format_address(*parsed) == address


@pytest.mark.parametrize(
    "address",
    ("", ":", "h", "h:", ":7000", "7000", "h:-1", "h:x", "h:7.0", "h: 7", "h:+7", "h:\u00b2", "[]:1"),
)
def test_a_bad_address_is_refused_by_the_flags_name(address: str) -> None:
    with pytest.raises(ValueError, match=r"--router is '.*'; it must be HOST:PORT"):
        parse_address("--router", address)


@pytest.mark.parametrize("address", ("::1:7000", "::1", "http://h:7000"))
def test_colons_in_a_host_need_brackets(address: str) -> None:
    with pytest.raises(ValueError, match=r"--router is '.*'; it must be HOST:PORT, and an IPv6 host in brackets"):
        parse_address("--router", address)


@pytest.mark.parametrize("port", ["65536", "99999", "9" * 5000])
def test_a_port_out_of_range_is_told_the_range(port: str) -> None:
    with pytest.raises(ValueError, match=r"^--router is 'h:9*6*5*3*6*'; its port must be in 0\.\.65535$"):
        parse_address("--router", f"h:{port}")


@pytest.mark.parametrize("host", HOSTS)
def test_sockets_meet_at_an_address(host: str, new: Callable[[int], zmq.Socket]) -> None:
    receiver, sender = new(zmq.PULL), new(zmq.PUSH)
    connect_to(sender, host, bind(receiver, host))
    sender.send(b"x")
    assert receiver.poll(SOON_MS) and receiver.recv() == b"x"


@needs_ipv6
def test_the_ipv6_wildcard_is_reached_over_both(new: Callable[[int], zmq.Socket]) -> None:
    receiver = new(zmq.PULL)
    port = bind(receiver, "::")
    for host in (V4, V6):
        sender = new(zmq.PUSH)
        connect_to(sender, host, port)
        sender.send(host.encode())
        assert receiver.poll(SOON_MS) and receiver.recv().decode() == host


def test_a_name_with_addresses_of_both_kinds_means_the_ipv4_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """So do a router that listens on `localhost` and a job that looks for it on 127.0.0.1 find each other."""
    both = [(socket.AF_INET6, 1, 6, "", (V6, 0, 0, 0)), (socket.AF_INET, 1, 6, "", (V4, 0))]
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *_, **__: both)
    assert resolve("localhost") == V4


@pytest.mark.parametrize("host", ("no such host", "a" * 70, "x..y", "999.1.1.1"))
def test_a_host_that_does_not_exist_is_refused_by_name(host: str, new: Callable[[int], zmq.Socket]) -> None:
    with pytest.raises(ValueError, match=f"no way to reach '{host}'"):
        local_host(host)
    with pytest.raises(ValueError, match=f"no way to reach '{host}'"):
        connect_to(new(zmq.PUSH), host, 7000)
    with pytest.raises(ValueError, match=f"cannot listen on {host}:7000: no such host"):
        bind(new(zmq.PULL), host, 7000)


def test_a_port_in_use_is_refused_with_its_address(new: Callable[[int], zmq.Socket]) -> None:
    port = bind(new(zmq.PULL), V4)
    with pytest.raises(ValueError, match=f"cannot listen on {V4}:{port}: Address already in use"):
        bind(new(zmq.PULL), V4, port)


def test_a_host_that_is_not_mine_cannot_be_listened_on(new: Callable[[int], zmq.Socket]) -> None:
    with pytest.raises(ValueError, match="cannot listen on 192.0.2.1:7000: Cannot assign requested address"):
        bind(new(zmq.PULL), "192.0.2.1", 7000)


@pytest.mark.parametrize("host", [V4, pytest.param(V6, marks=needs_ipv6)])
def test_my_address_towards_myself_is_the_loopback(host: str) -> None:
    assert local_host(host) == host


@needs_ipv6
def test_torchs_store_takes_the_hosts_that_a_rank_tells() -> None:
    store = dist.TCPStore(local_host(V6), 0, is_master=True, wait_for_workers=False)
    dist.TCPStore(V6, store.port, is_master=False).set("key", "value")
    assert store.get("key") == b"value"


def test_a_wildcard_is_every_address_of_the_machine() -> None:
    assert [is_wildcard(host) for host in ("0.0.0.0", "0", V4, "localhost")] == [True, True, False, False]
