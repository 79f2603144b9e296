"""The front door: what the user gave to do, a prompt or a batch of lines, and where the answers go."""

import json
import sys
import threading
from argparse import Namespace
from collections.abc import Callable

from tqdm import tqdm

from disagg.config import EngineConfig
from disagg.control.address import format_address, is_wildcard
from disagg.control.ports import RouterPort
from disagg.front.answer import INTERRUPTED, Answer
from disagg.front.jsonl import JsonLines
from disagg.front.lines import Lines
from disagg.front.output import Output
from disagg.front.parse import parse_request
from disagg.front.router import Router
from disagg.front.source import Listed
from disagg.front.tokenizer import load_tokenizer
from disagg.interrupt import Interrupt
from model.config import ModelConfig


class FrontDoor:
    """The router serves it; the unified job runs it in a thread."""

    def __init__(self, args: Namespace, config: ModelConfig, listen: tuple[str, int]):
        """Looks at everything that can be refused, and then listens. Lines are read when it runs."""
        longest = EngineConfig(max_model_len=args.max_model_len).model_len(config)
        encoder, self.output = load_tokenizer(args.model, longest), None
        self.tokenizer, self.vocab_size = encoder.tokenizer, config.vocab_size
        limits = config.vocab_size, longest
        if args.prompt is not None:
            line = json.dumps({"prompt": args.prompt, "max_tokens": args.max_tokens})
            self.source = Listed([parse_request(line, 1, encoder, *limits)])
        else:
            lines = Lines(args.input)
            self.output = Output(args.output, lines.stat, args.existing)
            self.source = JsonLines(lines, self.output, encoder, *limits, self._refused)
        self.port = RouterPort(*listen)
        self._answers = self._failures = 0

    def announce(self, host: str) -> None:
        print(f"router: listening on {format_address(host, self.port.port)}", file=sys.stderr, flush=True)
        if is_wildcard(host):
            print("router: anybody who reaches that port can take part and read the prompts", file=sys.stderr)

    def run(self, stopped: Callable[[], bool], expected: int = 0) -> None:
        self.router = Router(self.port, self.tokenizer, self.vocab_size, stopped, expected)
        there = len(self.output.kept) if self.output is not None else 0
        hidden = True if self.output is None else None  # a bar would mix with a prompt's text; None: on terminals only
        try:
            with tqdm(initial=there, unit="request", disable=hidden) as self.bar:
                self.router.run(self.source, self._deliver, self._show)
        finally:
            self.port.close()
        if self.output is not None:
            self.output.close()
            if not self.source.exhausted:
                unread = f"what the input has after line {self.source.read} was not read and has no answer"
                print(f"router: interrupted; {unread}", file=sys.stderr)
        print(self.router.metrics.table(), file=sys.stderr, flush=True)

    @property
    def failed(self) -> bool:
        """Did every request end with an error, none of them because the user wanted an end?"""
        return 0 < self._answers == self._failures

    def _refused(self, answer: Answer) -> None:
        """A line that never became a request has its answer."""
        self.router.metrics.finished["error"] += 1
        self._count(answer)

    def _deliver(self, position: int, answer: Answer) -> None:
        if self.output is not None:
            self.source.deliver(position, answer)
        else:
            self._print("\n")
            if answer.error is not None:
                print(f"run.py: error: {answer.error}", file=sys.stderr, flush=True)
        self._count(answer)

    def _count(self, answer: Answer) -> None:
        self._answers += 1
        self._failures += answer.error not in (None, INTERRUPTED)
        if self.output is not None:
            self.bar.total = self.source.total
        self.bar.update()

    def _show(self, position: int, piece: str) -> None:
        if self.output is None:
            self._print(piece)

    def _print(self, text: str) -> None:
        """BrokenPipeError if nobody reads it."""
        tqdm.write(text, file=sys.stdout, end="")
        sys.stdout.flush()


class RouterThread(threading.Thread):
    """The router beside rank 0 of a unified job. What breaks it also ends the job, and is raised by `join`."""

    def __init__(self, front: FrontDoor, interrupt: Interrupt, expected: int):
        super().__init__(name="router")
        self.front, self.interrupt, self.expected, self.error = front, interrupt, expected, None
        self.start()

    def run(self) -> None:
        try:
            self.front.run(lambda: self.interrupt.seen, self.expected)
        except Exception as error:
            self.error, self.interrupt.seen = error, True

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout)
        if self.error is not None:
            raise self.error
