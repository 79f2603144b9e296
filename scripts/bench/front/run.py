"""What does the HTTP door cost per token? Many streams at once, through one router process.

    clients (one process)  --HTTP, streamed-->  router (run.py --role router --http)  --ZeroMQ-->  replica (one thread)

The router is the real one, with the model's tokenizer. The replica is a double: it computes nothing, and gives every
request a token per step, all in one message, as an engine does. So the figures are of the router alone:

- paced: each stream gets `--rate` tokens per second. What part of a core does the router need?
- unpaced: the replica sends all tokens at once. How many tokens per second pass? Each event then has many of them.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from disagg.control.messages import Bye, Hello, Member, Submit, Tokens, Update, Updates
from disagg.control.ports import WorkerPort
from disagg.control.pulse import Beacon
from model.config import ModelConfig
from scripts.bench.lib.flags import new_file, positive
from scripts.bench.lib.measurements import ROOT, Measurement, save
from scripts.tools.demo import free_port

HOST = "127.0.0.1"
READY_S = 60


class Double(threading.Thread):
    """A unified replica that computes nothing. It waits for `streams` requests, then gives each a token per step."""

    def __init__(self, port: int, streams: int, tokens: int, rate: float | None, vocab: int) -> None:
        super().__init__(daemon=True)
        name = uuid.uuid4().hex
        hello = Hello("unified", [Member(name, HOST)], streams, 2**20, 2**30, {}, name)
        self.worker, self.beacon = WorkerPort(hello, HOST, port), Beacon(name, HOST, port)
        self.streams, self.tokens, self.rate, self.vocab = streams, tokens, rate, vocab
        self.began = 0.0
        self.leaves = threading.Event()

    def run(self) -> None:
        uids: list[int] = []
        step = 0
        while not self.leaves.is_set():
            self.beacon.turn += 1
            serving = len(uids) == self.streams and step < self.tokens
            for message in self.worker.poll(0 if serving else 20):
                if isinstance(message, Submit):
                    uids.append(message.request.uid)
                    self.worker.send(Updates(begun=[message.request.uid]))
            if serving:
                self.began = self.began or time.monotonic()
                if self.rate is not None:
                    time.sleep(max(0.0, self.began + step / self.rate - time.monotonic()))
                self._step(uids, step)
                step += 1
        self.worker.send(Bye({}))
        self.beacon.close()
        self.worker.close()

    def _step(self, uids: list[int], step: int) -> None:
        """Send a step's tokens. The last ones end their requests."""
        made = {uid: (7919 * (uid + step)) % self.vocab for uid in uids}
        if step < self.tokens - 1:
            self.worker.send(Updates([Tokens(made)]))
        else:
            self.worker.send(Updates([Update(uid, [token], finish="length") for uid, token in made.items()]))


async def receive(port: int, tokens: int) -> int:
    """Ask for one stream, and read it to its end. Returns how many events it had. Raises RuntimeError if it failed."""
    reader, writer = await asyncio.open_connection(HOST, port)
    asked = {"prompt": [5, 6, 7, 8], "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(asked).encode()
    head = f"host: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close"
    writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + body)
    lines = (await reader.read()).split(b"\n")
    events = [line for line in lines if line.startswith(b"data: {")]
    writer.close()
    if b" 200 " not in lines[0] or not events:
        raise RuntimeError(b"\n".join(lines).decode())
    usage = json.loads(events[-1].removeprefix(b"data: ")).get("usage")
    if usage is None or usage["completion_tokens"] != tokens:
        raise RuntimeError(f"a stream ended with {events[-1].decode()}")
    return len(events)


@dataclass
class Run:
    """One run. Times are in seconds."""

    tokens: int
    seconds: float
    cpu_s: float  # of the router
    events: int


def processor_time(pid: int) -> float:
    """Return the seconds for which a process's threads have run, in user and kernel mode, to the nanosecond."""
    return sum(int(thread.read_text().split()[0]) for thread in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


@dataclass(frozen=True)
class Router:
    """A router process: its id, its port for replicas, and its HTTP port."""

    pid: int
    port: int
    http: int
    vocab: int

    @classmethod
    @contextmanager
    def start(cls, model: Path) -> Iterator["Router"]:
        """Raises RuntimeError with what it said if it does not start."""
        port, http, vocab = free_port(), free_port(), ModelConfig.from_pretrained(model).vocab_size
        flags = ("--role", "router", "--router", f"{HOST}:{port}", "--model", str(model), "--http", f"{HOST}:{http}")
        command = [sys.executable, "run.py", *flags, "--log-interval", "0"]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, cwd=ROOT, stderr=errors)
            try:
                deadline = time.monotonic() + READY_S
                while health(http) is None:
                    if process.poll() is not None or time.monotonic() > deadline:
                        errors.seek(0)
                        raise RuntimeError(f"the router did not start: {errors.read()}")
                    time.sleep(0.05)
                yield cls(process.pid, port, http, vocab)
            finally:
                process.terminate()
                process.wait(READY_S)


def health(http: int) -> int | None:
    """Return the status of /health, or None if nobody listens."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{http}/health", timeout=READY_S) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (urllib.error.URLError, ConnectionError):
        return None


def measure(router: Router, streams: int, tokens: int, rate: float | None) -> Run:
    """Serve `streams` streams of `tokens` tokens each. `rate`: tokens per second of each; None: as fast as possible."""
    double = Double(router.port, streams, tokens, rate, router.vocab)
    double.start()
    while health(router.http) != 200:
        time.sleep(0.05)
    before = processor_time(router.pid)

    async def receive_all() -> list[int]:
        return await asyncio.gather(*(receive(router.http, tokens) for _ in range(streams)))

    events = asyncio.run(receive_all())
    after, ended = processor_time(router.pid), time.monotonic()
    double.leaves.set()
    double.join()
    while health(router.http) == 200:
        time.sleep(0.05)
    return Run(streams * tokens, ended - double.began, after - before, sum(events))


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model", type=Path, default=ROOT / "model" / "tiny", help="folder with config.json and tokenizer (model/tiny)"
    )
    add("--streams", type=positive, default=256, help="at once (256)")
    add("--tokens", type=positive, default=200, help="per stream (200)")
    add("--rate", type=positive, default=20, help="tokens per second of each stream, when paced (20)")
    add("--out", type=new_file, metavar="FILE", help="write the figures to FILE as JSON")
    return parser.parse_args(words)


def figures(args: argparse.Namespace, paced: Run, unpaced: Run) -> list[Measurement]:
    name = f"front door, {args.streams} streams, a double for the replica"
    at = f"paced at {args.rate} tok/s each"
    return [
        Measurement(f"{name}, {at}: tokens per second", round(paced.tokens / paced.seconds, 1), "tok/s"),
        Measurement(f"{name}, {at}: share of a core", round(paced.cpu_s / paced.seconds, 4), "", "lower"),
        Measurement(f"{name}, {at}: CPU per token", round(1e6 * paced.cpu_s / paced.tokens, 2), "us", "lower"),
        Measurement(f"{name}, unpaced: tokens per second", round(unpaced.tokens / unpaced.seconds, 1), "tok/s"),
        Measurement(f"{name}, unpaced: CPU per token", round(1e6 * unpaced.cpu_s / unpaced.tokens, 2), "us", "lower"),
    ]


def main() -> None:
    args = parse()
    print(f"{args.streams} streams of {args.tokens} tokens; the router is real, the replica is a double")
    runs = {}
    with Router.start(args.model) as router:
        for name, rate in (("paced", args.rate), ("unpaced", None)):
            one = runs[name] = measure(router, args.streams, args.tokens, rate)
            speed, share = one.tokens / one.seconds, one.cpu_s / one.seconds
            cost = f"{1e6 * one.cpu_s / one.tokens:.1f} us per token, {one.tokens / one.events:.2f} tokens per event"
            print(f"{name:>8}  {speed:,.0f} tok/s, {share:.1%} of a core, {cost}")
    if args.out is not None:
        save(figures(args, runs["paced"], runs["unpaced"]), args.out)


if __name__ == "__main__":
    main()
