"""An HTTP door in this process, with a replica whose part the test plays; and connections of raw bytes to it."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from disagg.control.messages import Abort, Bye, Finish, Hello, Member, Submit, Update, Updates
from disagg.control.ports import WorkerPort
from disagg.control.pulse import Beacon
from disagg.front.front_door import FrontDoor
from model.config import ModelConfig
from run import parse_args

HOST = "127.0.0.1"
SOON_S = 20
TOKEN = 45


class Actor(threading.Thread):
    """A unified replica. It gives each request what `answers` makes of it, and nothing to the others."""

    def __init__(self, port: int, answers: Callable[[Submit], list[Update]]) -> None:
        super().__init__(daemon=True)
        hello = Hello("unified", [Member("u", HOST)], 64, 1024, 2**20, {}, "u")
        self.worker, self.answers = WorkerPort(hello, HOST, port), answers
        self.submits: list[Submit] = []
        self.aborts: list[int] = []
        self.beacon = Beacon("u", HOST, port)
        self.start()

    def run(self) -> None:
        while True:
            self.beacon.turn += 1
            for message in self.worker.poll(20):
                match message:
                    case Finish():
                        self.worker.send(Bye({}))
                        self.beacon.close()
                        self.worker.close()
                        return
                    case Submit():
                        self.submits.append(message)
                        if updates := self.answers(message):
                            self.worker.send(Updates(updates, [message.request.uid]))
                    case Abort(uid):
                        self.aborts.append(uid)


def at_once(submit: Submit) -> list[Update]:
    """Answer with one token."""
    request = submit.request
    logprobs = [[(TOKEN, -0.5)]] if request.logprobs else []
    experts = b"" if not request.return_experts else bytes(2 * 4 * 4 * len(request.prompt))
    return [Update(request.uid, [TOKEN], logprobs, "length", experts=experts)]


def never(submit: Submit) -> list[Update]:
    return []


def first_token(submit: Submit) -> list[Update]:
    """Answer with the first token, and no more."""
    return [Update(submit.request.uid, [TOKEN])]


class Door:
    """A front door with --http that runs in a thread, with its actor, if it has one."""

    def __init__(self, model: Path, answers: Callable[[Submit], list[Update]] | None, *flags: str) -> None:
        args = parse_args(["--model", str(model), "--http", f"{HOST}:0", *flags])
        self.front = FrontDoor(args, ModelConfig.from_pretrained(model), (HOST, 0))
        self.stop, self.error = threading.Event(), None
        self.actor = Actor(self.front.port.port, answers) if answers is not None else None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self.port = self.front.http.port

    def _run(self) -> None:
        try:
            self.front.run(self.stop.is_set, expected=1)
        except Exception as error:
            self.error = error

    def end(self) -> None:
        self.stop.set()
        self.thread.join(SOON_S)
        assert not self.thread.is_alive() and self.error is None, self.error

    def connect(self) -> socket.socket:
        return socket.create_connection((HOST, self.port), timeout=SOON_S)

    def post(self, path: str, body: dict | bytes, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Return the status, the headers and the body of the answer."""
        with self.connect() as sock:
            sock.sendall(request_bytes(path, body, **headers))
            return read_answer(sock)

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        with self.connect() as sock:
            more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
            sock.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{more}\r\n".encode())
            return read_answer(sock)

    def until(self, health: int) -> None:
        """Wait until its health has this status."""
        deadline = time.monotonic() + SOON_S
        while True:
            with suppress(ConnectionRefusedError):
                if self.get("/health")[0] == health:
                    return
            assert time.monotonic() < deadline and self.error is None, self.error
            time.sleep(0.01)


def request_bytes(path: str, body: dict | bytes, **headers: str) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"content-type": "application/json", "content-length": str(len(raw)), "connection": "close"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"POST {path} HTTP/1.1\r\nhost: x\r\n{head}\r\n".encode() + raw


def read_answer(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read until the server closes. Returns the status, the headers, and the body, without the marks of its chunks."""
    pieces = []
    while piece := sock.recv(2**16):
        pieces.append(piece)
    head, _, body = b"".join(pieces).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    if headers.get("transfer-encoding") == "chunked":
        rest, body = body, b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return int(first.split()[1]), headers, body


def error_of(body: bytes) -> dict:
    """Return the error of an answer in OpenAI's shape."""
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def events(body: bytes) -> list[dict]:
    """Return the events of a stream, which must have ended well."""
    *lines, done = [line for line in body.decode().split("\n\n") if line]
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@contextmanager
def open_door(model: Path, answers: Callable[[Submit], list[Update]] | None = at_once, *flags: str) -> Iterator[Door]:
    door = Door(model, answers, *flags)
    try:
        door.until(503 if answers is None else 200)
        yield door
    finally:
        door.end()
