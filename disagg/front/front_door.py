"""The front door: serves the user's prompt, batch of lines or HTTP clients, and delivers the answers."""

import sys
import threading
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from typing import Any

from tqdm import tqdm

from disagg.config import EngineConfig
from disagg.control.access import is_loopback, read_secret
from disagg.control.address import format_address
from disagg.control.ports import RouterPort
from disagg.front.answer import INTERRUPTED, Answer
from disagg.front.expert_rows import RowShape
from disagg.front.generation_defaults import read_defaults
from disagg.front.jsonl import JsonLines
from disagg.front.lines import Lines
from disagg.front.output import Output
from disagg.front.parse import Served, parse_request
from disagg.front.router import Router
from disagg.front.source import Listed, Source
from disagg.front.tokenizer import NO_TOKENIZER, PromptEncoder, load_tokenizer
from model.config import ModelConfig


class FrontDoor:
    """Runs the router with the user's requests: in the router job, or in a process beside rank 0 of a unified job."""

    def __init__(self, args: Namespace, config: ModelConfig, listen: tuple[str, int]) -> None:
        """Check everything that can be refused, then listen. Lines are read in `run`."""
        self.secret = read_secret(args, listen[0])
        longest = EngineConfig(max_model_len=args.max_model_len).model_len(config)
        encoder = load_tokenizer(args.model, longest, config.vocab_size)
        if encoder.tokenizer is None and args.prompt is not None:
            raise ValueError(f"--prompt: {NO_TOKENIZER}; it can only serve prompt_token_ids of an --input")
        self.tokenizer, self.vocab_size = encoder.tokenizer, config.vocab_size
        self.expert_shape = RowShape(config.num_moe_layers, config.num_experts_per_tok)
        self.log_interval = args.log_interval
        served = Served(encoder, config.vocab_size, longest, read_defaults(args.model))
        self.output: Output | None = None  # this and `batch` are None without an --input, `source` and `http` for it
        self.batch: JsonLines | None = None
        self.source: Source | None = None
        self.http = load_http()(args, served) if args.http is not None else None
        if self.http is not None:
            pass
        elif args.prompt is not None:
            fields = {"prompt": args.prompt, "max_tokens": args.max_tokens, "temperature": 0}
            self.source = Listed([(parse_request(fields, 1, served), Printer(self._count))])
        else:
            lines = Lines(args.input)
            self.output = Output(args.output, lines.stat, args.existing)
            self.source = self.batch = JsonLines(lines, self.output, served, self._count, self._refused)
        self.port = RouterPort(*listen, self.secret)
        say_about_text(encoder)
        self._answers = self._failures = 0

    def announce(self, host: str) -> None:
        print(f"router: listening on {format_address(host, self.port.port)}", file=sys.stderr, flush=True)
        if self.secret is None and not is_loopback(host):
            print("router: anybody who reaches that port can take part and read the prompts", file=sys.stderr)

    def run(self, stopped: Callable[[], bool], expected: int = 0) -> None:
        """Serve all requests, and print the metrics. `stopped` and `expected` as in `Router`."""
        model = self.tokenizer, self.vocab_size
        self.router = Router(self.port, *model, stopped, expected, self.expert_shape, self.log_interval)
        answered = len(self.output.kept) if self.output is not None else 0
        hidden = True if self.output is None else None  # a bar would mix with a prompt's text; None: on terminals only
        try:
            with tqdm(initial=answered, unit="request", disable=hidden) as self.bar:
                if self.http is not None:
                    self._serve_http(self.http, stopped)
                elif self.source is not None:
                    self.router.run(self.source)
        finally:
            self.port.close()
        if self.output is not None:
            self.output.close()
        if self.batch is not None and not self.batch.exhausted:
            unread = f"what the input has after line {self.batch.read} was not read and has no answer"
            print(f"router: interrupted; {unread}", file=sys.stderr)
        print(self.router.metrics.table(), file=sys.stderr, flush=True)

    def _serve_http(self, door: Any, stopped: Callable[[], bool]) -> None:
        try:
            door.announce()
            door.run(self.router, stopped)
        finally:
            self.router.close()

    @property
    def failed(self) -> bool:
        """Did every request fail, not counting interrupted ones as failures?"""
        return 0 < self._answers == self._failures

    def _refused(self, answer: Answer) -> None:
        """Count the answer to a line that never became a request."""
        self.router.metrics.refused()

    def _count(self, answer: Answer) -> None:
        self._answers += 1
        self._failures += answer.error not in (None, INTERRUPTED)
        if self.batch is not None:
            self.bar.total = self.batch.total
        self.bar.update()


class Printer:
    """The client of a --prompt: prints the text while it is generated. Raises BrokenPipeError if nobody reads it."""

    def __init__(self, answered: Callable[[Answer], None]) -> None:
        self._answered = answered

    def show(self, piece: str, tokens: list[int], logprobs: list) -> None:
        tqdm.write(piece, file=sys.stdout, end="")
        sys.stdout.flush()

    def deliver(self, answer: Answer) -> None:
        self.show("\n", [], [])
        if answer.error is not None:
            print(f"run.py: error: {answer.error}", file=sys.stderr, flush=True)
        self._answered(answer)


def load_http() -> type:
    """Import the HTTP door. Raises ValueError if a package that it needs is missing."""
    try:
        return import_module("disagg.front.http.server").HttpDoor
    except ModuleNotFoundError as error:
        raise ValueError(f"--http needs the package {error.name}: pip install '.[serve]'") from None


def say_about_text(encoder: PromptEncoder) -> None:
    if encoder.tokenizer is None:
        print(f"router: {NO_TOKENIZER}: requests need prompt_token_ids, answers have no text", file=sys.stderr)
    elif encoder.bos is not None:
        word = encoder.tokenizer.id_to_token(encoder.bos)
        print(f"router: a prompt begins with {word}, because tokenizer_config.json says add_bos_token", file=sys.stderr)


class RouterThread(threading.Thread):
    """The router's thread. `join` raises an error in it."""

    def __init__(self, front: FrontDoor, stopped: Callable[[], bool]) -> None:
        super().__init__(name="router")
        self.front, self.stopped = front, stopped
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.front.run(self.stopped)
        except Exception as error:
            self.error = error

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout)
        if self.error is not None:
            raise self.error
