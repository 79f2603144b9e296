"""Whoever has the secret may take part, nobody else is heard, and no port that others can reach opens without one."""

import os
import pickle
import re
import signal
import socket
import threading
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.control import refusals as module
from disagg.control.access import read_secret
from disagg.control.messages import Abort, Beat, Hello, Member, encode
from disagg.control.ports import FAILURES, RouterPort, WorkerPort
from disagg.control.pulse import Beacon
from disagg.control.refusals import SAY_S, Refusals
from disagg.control.secret import KeyPair, Secret, stop_guarding
from disagg.handoff.connect import Door, dial, link_key, listen
from disagg.handoff.pipe import Pipe
from disagg.handoff.protocol import Cancel, Knock
from disagg.handoff.transports.torch_dist import TorchEndpoint
from parallel.interface import LOOPBACK, interface_of
from parallel.launched import launched_first_host
from parallel.mesh import GLOO, NCCL, Group, on_interface
from scripts.tools.demo import free_port
from tests.conftest import ROOT, eventually, has_ipv6, write_secret
from tests.deployment import run
from tests.processes import Process
from tests.worlds import run_world

HOST = "127.0.0.1"
RIGHT, WRONG = Secret.derive(b"right" * 8), Secret.derive(b"wrong" * 8)
# Ends that may not take part: without a secret, with another one, and with the server's key only.
HALF = Secret(RIGHT.server, WRONG.client)
STRANGERS = (None, WRONG, HALF)


def hello(name: str) -> Hello:
    return Hello("decode", [Member(name, HOST)], 4, 64, 640, {}, name)


def dealer(opened: Any, port: int, secret: Secret | None, kind: int = zmq.DEALER) -> zmq.Socket:
    sock = opened(zmq.Context.instance().socket(kind))
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.IDENTITY, b"stranger") if kind == zmq.DEALER else None
    if secret is not None:
        secret.show(sock)
    sock.connect(f"tcp://{HOST}:{port}")
    return sock


# ---- keys and the file


@given(st.binary(min_size=32, max_size=80), st.binary(min_size=32, max_size=80))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_keys_depend_on_the_whole_secret_and_on_nothing_else(one: bytes, other: bytes) -> None:
    keys = Secret.derive(one)
    assert keys == Secret.derive(one) and (keys == Secret.derive(other)) == (one == other)
    assert len({keys.server.private, keys.client.private, keys.server.public, keys.client.public}) == 4
    for pair in (keys.server, keys.client):
        assert pair.public == zmq.curve_public(pair.private)
        assert pair.private.decode() not in repr(keys)


def test_the_keys_of_a_release_are_those_of_the_next() -> None:
    """Jobs of two versions may serve together."""
    assert KeyPair.derive(bytes(range(32)), b"server").public == b"u}A.9:G8(XRH.hPC5b^nLsLA?P+*8/*bhJaPM$rH"
    assert KeyPair.derive(bytes(range(32)), b"client").public == b"lvl%}yK#?A2dPS)i8euTiQH>?F:p7xbe}Jaz<h1K"


BAD_FILES = {
    "short": ("x" * 31 + "\n", 0o600, "it has 31 bytes; a secret has 32 to 4096"),
    "long": ("x" * 4097, 0o600, "it has over 4096 bytes; a secret has 32 to 4096"),
    "group": ("x" * 32, 0o640, "only its owner may have access to it: chmod 600 "),
    "others": ("x" * 32, 0o604, "only its owner may have access to it: chmod 600 "),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_secret_that_is_none_is_refused_with_the_rule(name: str, tmp_path: Path) -> None:
    text, mode, rule = BAD_FILES[name]
    path = write_secret(tmp_path, text)
    path.chmod(mode)
    with pytest.raises(ValueError, match=re.escape(f"--secret-file {path}: {rule}")):
        Secret.read(str(path))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--secret-file .*/none: No such file or directory"):
        Secret.read(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="it must be a file|Is a directory"):
        Secret.read(str(tmp_path))


def test_white_space_around_a_secret_does_not_count(tmp_path: Path) -> None:
    path = write_secret(tmp_path, "  " + "s" * 32 + "\r\n")
    assert Secret.read(str(path)) == Secret.derive(b"s" * 32)


def test_without_curve_a_secret_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda what: what != "curve")
    with pytest.raises(ValueError, match="--secret-file needs CURVE, which this build of libzmq lacks"):
        Secret.read(str(write_secret(tmp_path)))


# ---- which ports may open


@pytest.mark.parametrize("hosts", (["127.0.0.1"], ["localhost"], ["::1"], ["127.8.8.8", "127.0.0.1"]))
def test_this_machine_alone_needs_no_secret(hosts: list[str]) -> None:
    assert read_secret(Namespace(secret_file=None, insecure=False), *hosts) is None


@pytest.mark.parametrize("hosts", (["0.0.0.0"], ["127.0.0.1", "10.0.0.5"], ["::"], ["192.0.2.1"]))
def test_a_host_that_others_can_reach_needs_one(hosts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"other machines can reach {hosts[-1]}: give all jobs the same --secret-file"):
        read_secret(Namespace(secret_file=None, insecure=False), *hosts)
    assert read_secret(Namespace(secret_file=None, insecure=True), *hosts) is None
    path = str(write_secret(tmp_path))
    assert read_secret(Namespace(secret_file=path, insecure=False), *hosts) == Secret.read(path)
    with pytest.raises(ValueError, match="--insecure is for ports without a --secret-file"):
        read_secret(Namespace(secret_file=path, insecure=True), *hosts)


@pytest.mark.parametrize("role", ("router", "prefill", "decode"))
def test_every_role_refuses_to_start_where_others_can_reach_it(role: str, tiny: Path) -> None:
    prompt = ("--prompt", "x") if role == "router" else ()
    code, _, err = run("--model", str(tiny), "--role", role, "--router", "0.0.0.0:7000", *prompt)
    assert code == 2 and err.startswith("run.py: error: other machines can reach 0.0.0.0: give all jobs the same "), err


def test_a_job_says_once_that_the_router_refuses_its_secret(tiny: Path, tmp_path: Path) -> None:
    """It joins when the right router comes. A unified job has its own router, with the same secret."""
    paths = [write_secret(tmp_path / name, name * 40) for name in ("a", "b")]
    address = f"{HOST}:{free_port()}"
    flags = ["--model", str(tiny), "--router", address]
    router = ["--role", "router", "--prompt", "In", *flags]
    wrong = Process([*router, "--secret-file", str(paths[0])])
    decode = Process(["--role", "decode", *flags, "--secret-file", str(paths[1])])
    bare = Process(["--role", "prefill", *flags])
    said = f"decode: the router at {address} refuses this job's secret, or has none (--secret-file)\n"
    decode.until(said)
    bare.until(f"prefill: the router at {address} refuses this job, which has no secret (--secret-file)\n")
    wrong.until("router: a connection was refused: ")
    for process in (wrong, bare):
        process.end()
    right = Process([*router, "--secret-file", str(paths[1])])
    decode.until(f"decode: joined the router at {address}\n")
    assert decode.err.count(said) == 1 and "joined" not in wrong.err + bare.err
    os.kill(right.pid, signal.SIGINT)
    assert [process.finish()[0] for process in (right, decode)] == [0, 0]
    code, out, err = run("--model", str(tiny), "--prompt", "In", "--max-tokens", "2", "--secret-file", str(paths[0]))
    assert code == 0 and out.strip() and "refus" not in err, err


# ---- the ports


def test_router_and_worker_meet_with_the_same_secret_only(opened: Any) -> None:
    router = opened(RouterPort(HOST, 0, RIGHT))
    worker = opened(WorkerPort(hello("w"), HOST, router.port, RIGHT))
    others = [opened(WorkerPort(hello(f"s{i}"), HOST, router.port, secret)) for i, secret in enumerate(STRANGERS[:2])]
    beacons = [opened(Beacon(f"b{i}", HOST, router.port, secret)) for i, secret in enumerate((RIGHT, *STRANGERS))]
    heard: dict[tuple[str, type], int] = {}

    def all_met() -> bool:
        worker.poll(10)
        for name, message in router.poll(10):
            heard[name, type(message)] = 1
            if isinstance(message, Hello):
                router.admit(name)
        for other in others:
            assert not other.poll() and not other.welcomed
        return worker.welcomed and all(other.shut_out for other in others) and len(heard) == 2

    assert eventually(all_met), heard
    assert not worker.shut_out and len(beacons) == 4
    assert set(heard) == {("w", Hello), ("beacon of b0", Beat)}
    assert router.send("w", Abort(3)) and eventually(lambda: worker.poll(10) == [Abort(3)])
    assert router.refusals.count >= 2 * FAILURES


def test_a_router_without_a_secret_is_not_believed_by_a_job_with_one(opened: Any) -> None:
    router = opened(RouterPort(HOST, 0))
    worker = opened(WorkerPort(hello("w"), HOST, router.port, RIGHT))

    def gives_up() -> bool:
        assert not router.poll(10) and not worker.poll(10)
        return worker.shut_out

    assert eventually(gives_up) and not worker.welcomed


@pytest.mark.parametrize("first", (None, WRONG), ids=("none", "wrong"))
@pytest.mark.parametrize("mine", (None, RIGHT), ids=("without", "with"))
def test_a_worker_that_was_shut_out_joins_once_the_right_router_is_there(
    mine: Secret | None, first: Secret | None, opened: Any
) -> None:
    """So does its beacon. ZeroMQ alone would not try again after some of these failures."""
    first = RIGHT if mine is None and first is None else first
    wrong = RouterPort(HOST, 0, first)
    worker = opened(WorkerPort(hello("w"), HOST, wrong.port, mine))
    opened(Beacon("w", HOST, wrong.port, mine))
    assert eventually(lambda: not wrong.poll(10) and not worker.poll(10) and worker.shut_out)
    deadline = time.monotonic() + 2.5  # the beacon has tried too
    while time.monotonic() < deadline:
        assert not wrong.poll(100) and not worker.poll()
    port = wrong.port
    wrong.close()
    right, heard = opened(RouterPort(HOST, port, mine)), set()

    def joined() -> bool:
        for name, message in right.poll(10):
            heard.add(type(message))
            if isinstance(message, Hello):
                right.admit(name)
        worker.poll(10)
        return worker.welcomed and heard == {Hello, Beat}

    assert eventually(joined) and not worker.shut_out


@pytest.mark.parametrize("secret", STRANGERS, ids=("none", "wrong", "half"))
def test_a_door_and_a_pipe_hear_no_stranger(secret: Secret | None, opened: Any) -> None:
    """Not even one who knows the name of the link's peer."""
    door = opened(Door(HOST, RIGHT))
    pipe = opened(Pipe.listen(HOST, "stranger", Cancel, RIGHT, door.link_refusals))
    knocking, speaking = dealer(opened, door.port, secret, zmq.PUSH), dealer(opened, pipe.port, secret)
    with suppress(zmq.Again):  # it has been shut out already
        knocking.send(encode(Knock(Member("x", HOST), 0)), zmq.DONTWAIT)
        speaking.send_multipart([(1).to_bytes(8, "little"), encode(Cancel(1))], zmq.DONTWAIT)

    def refused() -> bool:
        assert not door.poll(10) and not pipe.poll(10)
        return pipe.has_gone and door.refusals.count > 0 and door.link_refusals.count > 0

    assert eventually(refused)
    assert not door.poll(100) and not pipe.poll(100) and not pipe.is_met
    dealer(opened, door.port, RIGHT, zmq.PUSH).send(encode(Knock(Member("y", HOST), 0)))
    assert eventually(lambda: door.poll(10) == [Knock(Member("y", HOST), 0)])


def test_a_link_is_made_with_the_secret(opened: Any) -> None:
    door, decode = opened(Door(HOST, RIGHT)), Member("d", HOST)
    endpoint = TorchEndpoint(torch.device("cpu"), HOST)
    prefill = Member("p", HOST, door.port, door.store.port)
    key, ends = link_key(prefill, decode), {}

    def dialled() -> None:
        ends["decode"] = dial(prefill, decode, endpoint, 0, RIGHT)(key)

    thread = threading.Thread(target=dialled)
    thread.start()
    assert eventually(lambda: bool(door.poll(10)))
    ends["prefill"] = listen(door.store.port, HOST, endpoint, RIGHT, door.link_refusals)(key)
    thread.join(20)
    (mine, _), (theirs, _) = ends["prefill"], ends["decode"]
    opened(mine), opened(theirs)
    assert eventually(lambda: mine.poll(10) == [] and mine.is_met)
    theirs.send(Cancel(5))
    assert eventually(lambda: mine.poll(10) == [Cancel(5)])
    assert door.refusals.count == door.link_refusals.count == 0


def test_if_nobody_checks_clients_none_is_accepted(opened: Any) -> None:
    """The authenticator is a thread: if it ends, the port must shut, not open."""
    router = opened(RouterPort(HOST, 0, RIGHT))
    stop_guarding(router._context)
    worker = opened(WorkerPort(hello("w"), HOST, router.port, RIGHT))
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        assert not worker.poll(10) and not router.poll(10), "it was let in"


# ---- between ranks


class Evil:
    """What unpickling it would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def send_pickled(rank: int, path: Path) -> None:
    """Rank 1 answers an exchange as torch's exchange of objects would."""
    group = Group(2, rank, dist.group.WORLD)
    if rank == 0:
        with pytest.raises(ValueError):
            group.exchange("honest", str)
        return
    body = torch.frombuffer(bytearray(pickle.dumps(Evil(path))), dtype=torch.uint8)
    sizes = group.all_gather(torch.tensor([body.numel()]))
    padded = torch.zeros(1, int(sizes.max()), dtype=torch.uint8)
    padded[0, : body.numel()] = body
    group.all_gather(padded)


def test_ranks_run_no_code_of_one_another(tmp_path: Path) -> None:
    path = tmp_path / "run"
    pickle.loads(pickle.dumps(Evil(path)))
    assert path.exists(), "the payload works"
    path.unlink()
    run_world(2, send_pickled, path)
    assert not path.exists()
    sources = [p for name in ("kernels", "parallel", "model", "disagg") for p in (ROOT / name).rglob("*.py")]
    calls = r"(import|from) pickle|(gather|broadcast|scatter|send|recv)_object|torch\.load\(|allow_pickle=True"
    assert [str(p) for p in sources if re.search(calls, p.read_text())] == []


@pytest.mark.parametrize("local, host", (("2", "127.0.0.1"), ("1", "10.0.0.5"), (None, "10.0.0.5")))
def test_a_job_whose_ranks_are_all_here_uses_the_loopback(
    local: str | None, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.5")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert launched_first_host() == host


def test_gloo_listens_on_the_loopback_while_a_job_meets_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GLOO, raising=False)
    with on_interface(LOOPBACK):
        assert os.environ[GLOO] in ("lo", "lo0")
    assert GLOO not in os.environ
    monkeypatch.setenv(GLOO, "eth7")
    with on_interface(LOOPBACK):
        assert os.environ[GLOO] == "eth7"
    assert os.environ[GLOO] == "eth7"


def test_an_interface_is_found_by_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several machines it stays named, because links and NCCL's groups are made later."""
    assert interface_of("127.0.0.1") in ("lo", "lo0") and interface_of("192.0.2.1") is None
    if has_ipv6():
        assert interface_of("::1") == interface_of("127.0.0.1")
    for name in (GLOO, NCCL):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(NCCL, "eth7")
    with on_interface("127.0.0.2"):
        pass
    assert os.environ.pop(GLOO) in ("lo", "lo0") and os.environ[NCCL] == "eth7"
    with (
        pytest.raises(ValueError, match="no way to reach 'no.such.host.invalid'"),
        on_interface("no.such.host.invalid"),
    ):
        pass


def test_a_job_over_several_machines_needs_a_secret(tiny: Path) -> None:
    """Here the two machines are one, and 0.0.0.0 is an address of it that is not the loopback's."""
    common = {"MASTER_ADDR": "0.0.0.0", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    argv = ["--model", str(tiny), "--prompt", "x"]
    ranks = [Process(argv, env=common | {"RANK": str(rank), "LOCAL_RANK": "0"}) for rank in range(2)]
    for code, _, err in [rank.finish() for rank in ranks]:
        assert code == 2 and "run.py: error: other machines can reach 0.0.0.0: give all jobs the same --secret" in err


# ---- what was refused is counted, and said in few lines


def test_refusals_are_counted_and_said_once_in_a_while(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    refusals = Refusals("router")
    for i in range(1000):
        now[0] = 1000 + i * SAY_S / 500
        refusals.add("a message", f"number {i}\n\x1b[31m" + "x" * 500)
    refusals.add("a link", "too many")
    first, second, other = capsys.readouterr().err.splitlines()
    assert refusals.count == 1001 and max(map(len, (first, second))) < 400
    assert first.startswith("router: a message was refused: number 0??[31mxxx") and "before" not in first
    assert second.startswith("router: a message was refused: number 500??[31mxxx") and second.endswith(
        "; 499 before it"
    )
    assert other == "router: a link was refused: too many"


def test_many_who_come_and_go_stop_no_port(opened: Any) -> None:
    """ZeroMQ tells of each of them; its queue of such news must not be full one day."""
    router = opened(RouterPort(HOST, 0, RIGHT))
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)  # of ZMTP, without keys
    for _ in range(2500):
        with socket.create_connection((HOST, router.port)) as sock:
            sock.sendall(greeting)
    worker = opened(WorkerPort(hello("w"), HOST, router.port, RIGHT))
    assert eventually(lambda: bool(worker.poll(10) or router._sock.poll(0))), "its first message came"
    assert router.poll(0) and router.refusals.count > 2000
