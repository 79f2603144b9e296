"""Clients of a deployment that stream, over HTTP. Each compares its answer with that of one process."""

import http.client
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

HOST = "127.0.0.1"
GAP_S = 0.25  # after a longer gap a client asks where its request is now
LEAVES = 0.2  # of the requests, the share whose client leaves before the end
KINDS = 40  # different requests
VOCAB_SIZE = 4096


def make_lines(seed: int, max_tokens: int = 48) -> list[dict]:
    """Return requests of all lengths, greedy and sampled. A quarter shows each of its tokens."""
    rng, lines = random.Random(seed), []
    for i in range(KINDS):
        prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.choice((1, 63, 64, 65, 130, 300)))]
        line = {"prompt": prompt, "max_tokens": rng.randint(max_tokens // 2, max_tokens), "ignore_eos": True}
        if i % 2:
            line |= {"temperature": 0.9, "top_p": 0.9, "seed": i}
        if i % 4 == 3:
            line["logprobs"] = 0
        lines.append(line)
    return lines


@dataclass(frozen=True)
class Said:
    """What an answer says, apart from when."""

    text: str
    words: tuple[str, ...]  # of each token, if the request asks for them
    reason: str
    tokens: int


@dataclass(frozen=True)
class Gap:
    """Between two pieces of one stream. `moved`: to another decode replica? `ranks`: of the one that it was on."""

    began: float
    ended: float
    moved: bool
    ranks: int

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass
class Stream:
    """A request on its way, and what came of it. Times are time.monotonic()."""

    line: dict
    name: str
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0  # 0.0: not yet
    times: list[float] = field(default_factory=list)  # of its pieces with text or tokens
    said: Said | None = None
    error: str | None = None
    left: bool = False  # has its client left?
    gaps: list[Gap] = field(default_factory=list)  # those over GAP_S


class Door:
    """A deployment's HTTP door."""

    def __init__(self, port: int, limit_s: float) -> None:
        """`limit_s`: a client that hears nothing for longer calls it a hang."""
        self.port, self.limit_s = port, limit_s

    def get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=self.limit_s)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def where(self, name: str) -> tuple[str, int]:
        """Return which decode replica serves a request, and how many ranks that has (0: it has left)."""
        picture = json.loads(self.get(f"/deployment?request={name}"))
        decode = picture["request"]["decode"]
        return decode, next((len(card["ranks"]) for card in picture["replicas"] if card["id"] == decode), 0)

    def ask(self, stream: Stream, leave_after: int | None = None, watch: bool = True) -> None:
        """Send the request, and read its answer. `leave_after`: the client leaves after so many pieces.

        `watch`: look where it is, to tell its gaps apart.
        """
        connection = http.client.HTTPConnection(HOST, self.port, timeout=self.limit_s)
        body = json.dumps({**stream.line, "stream": True, "stream_options": {"include_usage": True}})
        try:
            headers = {"content-type": "application/json", "x-request-id": stream.name}
            connection.request("POST", "/v1/completions", body, headers)
            if leave_after == 0:
                self._leave(connection, stream)
                return
            response = connection.getresponse()
            if response.status != 200:
                stream.error = f"{response.status}: {response.read().decode()}"
                return
            self._read(connection, response, stream, leave_after, watch)
        except (OSError, http.client.HTTPException) as error:
            stream.error = f"{type(error).__name__}: {error}"
        finally:
            stream.ended = time.monotonic()
            connection.close()

    def _read(
        self,
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
        stream: Stream,
        leave_after: int | None,
        watch: bool,
    ) -> None:
        text, words, reason, tokens, place = "", [], "", -1, ("", 0)
        for raw in response:
            if not raw.startswith(b"data: ") or raw.startswith(b"data: [DONE]"):
                continue
            event = json.loads(raw[6:])
            if "error" in event:
                stream.error = event["error"]["message"]
                return
            if not event["choices"]:
                tokens = event["usage"]["completion_tokens"]
                continue
            (choice,) = event["choices"]
            text += choice["text"]
            words += choice["logprobs"]["tokens"] if choice["logprobs"] else []
            reason = choice["finish_reason"] or reason
            now = time.monotonic()
            if watch and (not stream.times or now - stream.times[-1] > GAP_S):
                before, place = place, self.where(stream.name)
                if stream.times:
                    stream.gaps.append(Gap(stream.times[-1], now, place[0] != before[0], before[1]))
            stream.times.append(now)
            if leave_after is not None and len(stream.times) >= leave_after:
                response.close()
                self._leave(connection, stream)
                return
        stream.said = Said(text, tuple(words), reason, tokens)

    def _leave(self, connection: http.client.HTTPConnection, stream: Stream) -> None:
        """As if its process had been killed."""
        stream.left = True
        if connection.sock is not None:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Load:
    """Clients that ask one request after another, each one of `lines`."""

    def __init__(self, door: Door, lines: list[dict], seed: int) -> None:
        self.door, self.lines, self.seed = door, lines, seed
        self.streams: list[Stream] = []
        self._over, self._threads = threading.Event(), list[threading.Thread]()

    def start(self, clients: int) -> None:
        for number in range(clients):
            self._run(self._client, random.Random(f"{self.seed} {number}"))

    def _run(self, target: Callable[..., object], *args: object) -> None:
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def _client(self, rng: random.Random) -> None:
        while not self._over.is_set():
            line = rng.choice(self.lines)
            leave = rng.randrange(line["max_tokens"]) if rng.random() < LEAVES else None
            if self.ask(line, leave).error is not None:
                time.sleep(1)  # as it is told (Retry-After)

    def ask(self, line: dict, leave_after: int | None = None) -> Stream:
        stream = Stream(line, f"{self.seed}-{id(line)}-{time.monotonic_ns()}")
        self.streams.append(stream)
        self.door.ask(stream, leave_after)
        return stream

    def together(self, count: int) -> list[Stream]:
        """Ask so many of the longer requests at once, by as many clients. They are on their way when it returns."""
        before = len(self.streams)
        longer = sorted(self.lines, key=lambda line: line["max_tokens"])[-len(self.lines) // 4 :]
        for i in range(count):
            self._run(self.ask, longer[i % len(longer)])
        while len(self.streams) < before + count:
            time.sleep(0.01)
        return self.streams[before:]

    def went_on(self, since: float) -> bool:
        """Has every request that was on its way then ended, or got two pieces more?"""
        return all(
            stream.ended or stream.began > since or sum(at > since for at in stream.times) >= 2
            for stream in list(self.streams)
        )

    def stop(self, seconds: float) -> list[Stream]:
        """Ask no more. Returns the streams that have not ended within `seconds`."""
        self._over.set()
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [stream for stream in self.streams if not stream.ended]


def answers(door: Door, lines: list[dict]) -> list[Said]:
    """Return what one process answers, undisturbed. Raises AssertionError if it does not."""

    def answer(line: dict) -> Said:
        stream = Stream(line, "")
        door.ask(stream, watch=False)
        assert stream.said is not None, stream.error
        return stream.said

    with ThreadPoolExecutor(len(lines)) as clients:
        return list(clients.map(answer, lines))
