"""Forged and random bytes for every port of every role, while requests are served.

`python -m tests.hostile_ports 10000` starts a router, a prefill and a decode job, without a secret and then with one,
and sends that many messages to every port. It prints what came of it.

Ports of torch get theirs first: its store keeps some memory of each connection that says what it does not understand.
Then memory is looked at after each third of the messages to the other ports, which are ZeroMQ's and HTTP's.
"""

import json
import os
import random
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import msgspec

from disagg.control.messages import encode
from disagg.control.session import Header
from scripts.tools.demo import free_port
from tests.conftest import eventually, write_secret
from tests.deployment import LINES, answers_alone, write_lines
from tests.processes import Process
from tests.test_control import EXAMPLES

HOST = "127.0.0.1"
SOON_S = 60
MANY = 100  # messages on one connection
HUGE = (2**31, 2**53, 2**63, 2**64 - 1, -1, -(2**63), 1e308, float("nan"))
ODD = (None, True, "", "x" * 300, b"\0" * 300, [], {}, [[]] * 50, {"type": "Hello"}, *HUGE)
SOCKETS = (*[b"DEALER", b"PUSH"] * 5, b"REQ", b"PAIR", b"SUB")  # the first two are what the ports expect


# ---- what is sent


def forge(rng: random.Random, messages: list[Any]) -> bytes:
    """Return random bytes, or a real message with something wrong in it, or a real one."""
    if rng.random() < 0.2:
        return rng.randbytes(rng.randrange(200))
    body = encode(rng.choice(messages))
    match rng.randrange(4):
        case 0:
            return body
        case 1:  # cut, or with other bytes in the middle
            at = rng.randrange(len(body))
            return body[:at] + rng.randbytes(rng.randrange(4)) + body[at + rng.randrange(4) :]
        case 2:
            return encode(spoil(rng, msgspec.msgpack.decode(body)))
        case _:
            return b"\x82\xa4type\xa5Hello\xa1z" + b"\x91" * rng.choice((10, 5000)) + b"\xc0"


def spoil(rng: random.Random, value: Any) -> Any:
    """Replace one of the values inside."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        return value | {key: spoil(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], spoil(rng, value[at]), *value[at + 1 :]]
    return rng.choice(ODD)


def frames(rng: random.Random, messages: list[Any]) -> list[bytes]:
    """Return a message's frames, as the router, a link or a door expects them, or in another number."""
    body = forge(rng, messages)
    header = encode(Header(rng.choice(("", "guessed", "x" * 300)), rng.choice((0, 1, 2**63)), rng.randrange(9)))
    number = rng.choice((1, 2, 2**40)).to_bytes(8, "little")
    return rng.choice(([body], [header, body], [number, body], [header, body, body], [b""], [rng.randbytes(9), body]))


def greeting(rng: random.Random, kind: bytes | None = None) -> bytes:
    """Return what a ZeroMQ peer without keys says first."""
    name = rng.choice((b"", b"stranger", b"\0", rng.randbytes(20)))
    ready = b"\x05READY\x0bSocket-Type" + _sized(kind or rng.choice(SOCKETS)) + b"\x08Identity" + _sized(name)
    hello = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    return hello + b"\x04" + bytes([len(ready)]) + ready


def _sized(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def on_the_wire(message: list[bytes]) -> bytes:
    flags = [*[1] * (len(message) - 1), 0]
    return b"".join(bytes([2 | more]) + struct.pack(">Q", len(f)) + f for more, f in zip(flags, message, strict=True))


def send_to(port: int, first: bytes, rest: bytes) -> None:
    """Send what the port takes, the rest once it has answered. It may close the connection at any time."""
    with suppress(OSError), socket.create_connection((HOST, port), timeout=5) as sock:
        sock.sendall(first)
        _hear(sock, 65)  # a greeting and the beginning of a command: messages that come earlier are not read
        sock.sendall(rest)
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(0.02)
        with suppress(TimeoutError):
            while sock.recv(2**16):
                pass


def _hear(sock: socket.socket, least: int) -> None:
    sock.settimeout(0.1)
    got = 0
    with suppress(TimeoutError):
        while got < least and (piece := sock.recv(2**16)):
            got += len(piece)
    sock.settimeout(5)


def announce(port: int, size: int, sent: int) -> None:
    """Announce a frame of `size` bytes, and send up to `sent` of them."""
    with suppress(OSError), socket.create_connection((HOST, port), timeout=5) as sock:
        sock.sendall(greeting(random.Random(0)))
        _hear(sock, 65)
        sock.sendall(b"\x02" + struct.pack(">Q", size))
        for _ in range(sent // 2**16):
            sock.sendall(bytes(2**16))


# ---- whom it is sent to


def listening(pid: int) -> list[int]:
    """Return the TCP ports at which a process listens. (Linux)"""
    links = [link for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    own = set()
    for link in links:
        with suppress(FileNotFoundError):
            own.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
    rows = [
        row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
    ]
    return sorted({int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in own})


def is_torchs(port: int, host: str = HOST) -> bool:
    """Is it of torch's store or of a transport, which do not greet as ZeroMQ does?"""
    try:
        with socket.create_connection((host, port), timeout=0.5) as sock:
            return sock.recv(1) != greeting(random.Random(0))[:1]
    except (TimeoutError, ConnectionRefusedError):  # the latter: it listens at another address
        return True


def resident(pid: int) -> float:
    """Return the MiB of memory that a process has."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return round(int(line.split()[1]) / 1024, 1)


@dataclass
class Figures:
    """What came of an attack, by role where there are several."""

    ports: dict[str, list[int]] = field(default_factory=dict)  # of ZeroMQ and HTTP
    torchs: dict[str, list[int]] = field(default_factory=dict)
    memory: dict[str, list[float]] = field(default_factory=dict)  # MiB: before, after torch's ports, after each third
    answers: int = 0  # all of them right
    wrong: list[str] = field(default_factory=list)
    refusals: dict[str, float] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)  # about refusals
    statuses: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class Deployment:
    """A router with HTTP, a prefill and a decode job."""

    def __init__(self, model: Path, flags: list[str]) -> None:
        self.http = free_port()
        address = f"{HOST}:{free_port()}"
        common = ["--model", str(model), "--router", address, *flags]
        often = {"disagg.reports.REPORT_S": 0.3}
        self.jobs = {
            "router": Process(["--role", "router", "--http", f"{HOST}:{self.http}", *common]),
            **{role: Process(["--role", role, *common], constants=often) for role in ("prefill", "decode")},
        }
        for role in ("prefill", "decode"):
            self.jobs["router"].until(f"a {role} replica joined", SOON_S)

    def ask(self, line: dict) -> str:
        """Return the text of an answer."""
        body = {k: v for k, v in line.items() if k != "id"}
        asked = HttpRequest(f"http://{HOST}:{self.http}/v1/completions", json.dumps(body).encode())
        asked.add_header("content-type", "application/json")
        with urlopen(asked, timeout=SOON_S) as answer:
            return json.load(answer)["choices"][0]["text"]

    def refusals(self) -> dict[str, float]:
        with urlopen(f"http://{HOST}:{self.http}/metrics", timeout=SOON_S) as answer:
            lines = answer.read().decode().splitlines()
        rows = [line for line in lines if line.startswith("moesaic_refusals_total{")]
        return {row.split('role="')[1].split('"')[0]: float(row.split()[-1]) for row in rows}


@contextmanager
def deployed(model: Path, flags: list[str]) -> Iterator[Deployment]:
    place = Deployment(model, flags)
    try:
        yield place
    finally:
        for job in place.jobs.values():
            if job.status is None:
                job.end()


# ---- the attack


def one_process(model: Path, folder: Path) -> dict[str, str]:
    """Return the texts, by id, that one process answers to the lines with a prompt."""
    source = write_lines(folder / "lines.jsonl")
    prompts = {line["id"] for line in LINES if "prompt" in line}
    answers = answers_alone(model, source, folder / "alone.jsonl")
    return {answer["id"]: answer["text"] for answer in answers if answer["id"] in prompts}


def attack(
    model: Path, folder: Path, secret: bool, count: int, idle: int, frame: int, expected: dict[str, str], torchs: int
) -> Figures:
    """Send `count` messages and `idle` silent connections to every port. `frame`: bytes that are announced.

    `expected`: the texts of `one_process`. `torchs`: messages to ports of torch.
    """
    lines = [line for line in LINES if line["id"] in expected]
    figures, began, over = Figures(), time.monotonic(), threading.Event()
    flags = ["--secret-file", str(write_secret(folder))] if secret else []
    with deployed(model, flags) as place:
        pids = {role: job.pid for role, job in place.jobs.items()}

        def check(line: dict) -> None:
            if (text := place.ask(line)) != expected[line["id"]]:
                figures.wrong.append(f"{line['id']}: {text!r}")
            figures.answers += 1

        def serve() -> None:
            while not over.is_set():
                for line in lines:
                    check(line)

        for line in lines:  # so that the link is there
            check(line)
        for role, pid in pids.items():
            ports = {port: port != place.http and is_torchs(port) for port in listening(pid)}
            figures.ports[role] = [port for port in ports if not ports[port]]
            figures.torchs[role] = [port for port in ports if ports[port]]

        def look() -> None:
            for role, pid in pids.items():
                figures.memory.setdefault(role, []).append(resident(pid))

        look()
        client = threading.Thread(target=serve)
        client.start()
        ours, theirs = (sum(of.values(), []) for of in (figures.ports, figures.torchs))
        try:
            silent = [sock for port in ours + theirs for sock in keep_silent(port, idle)]
            send_everything(theirs, torchs, frame)
            look()
            for _ in range(3):
                send_everything(ours, count // 3, frame)
                look()
        finally:
            over.set()
            client.join()
        for line in lines:
            check(line)
        for sock in silent:
            sock.close()
        eventually(lambda: place.refusals().get("prefill", 0) > 0, 5)
        figures.refusals = place.refusals()
        os.kill(pids["router"], signal.SIGINT)
        for role, job in place.jobs.items():
            code, _, err = job.finish(SOON_S)
            figures.statuses[role] = code
            figures.lines[role] = [line for line in err.splitlines() if "was refused" in line]
            assert "Traceback" not in err, f"{role}: {err}"
    figures.seconds = time.monotonic() - began
    return figures


def keep_silent(port: int, count: int) -> Iterator[socket.socket]:
    """Yield so many connections that say nothing."""
    for _ in range(count):
        with suppress(OSError):
            yield socket.create_connection((HOST, port), timeout=5)


def send_everything(ports: list[int], count: int, frame: int) -> None:
    rng = random.Random(0)
    messages = [message for examples in EXAMPLES.values() for message in examples]
    for port in ports:
        for kind in SOCKETS[:2]:  # one of them is heard for certain, and refused
            send_to(port, greeting(rng, kind), on_the_wire([b"junk", b"junk"]))
        sent = 0
        while sent < count:
            several = min(rng.choice((1, 10, MANY)), count - sent)
            data = b"".join(on_the_wire(frames(rng, messages)) for _ in range(several))
            send_to(port, greeting(rng) if rng.random() < 0.9 else rng.randbytes(64), data)
            sent += several
        announce(port, frame, min(frame, 32 * 2**20))


def check(figures: Figures, grown: float, flat: float) -> None:
    """Raise AssertionError unless nothing came of the attack.

    `grown`: MiB by which a process may have grown in all; `flat`: in the second and last third.
    """
    assert not figures.wrong and figures.answers > 0, figures.wrong
    assert set(figures.statuses.values()) == {0}, figures.statuses
    for role, (before, _, first, _, last) in figures.memory.items():
        assert last - before <= grown and last - first <= flat, f"{role}: {figures.memory[role]} MiB"
    assert figures.refusals["router"] > 0 and figures.refusals["prefill"] > 0, figures.refusals
    for role, lines in figures.lines.items():  # at most one a minute about each kind
        kinds = {line.partition(" was refused: ")[0] for line in lines}
        assert len(lines) <= len(kinds) * (1 + figures.seconds // 60), f"{role}: {lines}"
    assert figures.lines["router"] and figures.lines["prefill"], figures.lines


if __name__ == "__main__":
    for with_secret in (False, True):
        with tempfile.TemporaryDirectory() as scratch:
            texts = one_process(Path("model/tiny"), Path(scratch))
            many = int(sys.argv[1])
            found = attack(Path("model/tiny"), Path(scratch), with_secret, many, 500, 2**30, texts, torchs=many)
            print("with a secret" if with_secret else "without a secret", json.dumps(vars(found), indent=1))
            check(found, 100, 3)
