"""SGLang as a peer: the work of scripts.bench.engine through its offline engine. Used by peer.py.

Its scheduler is a process of its own, which imports the script anew, as the module `__mp_main__`. `watch` is called
there. It puts in our random weights, and notes in a file when prompts come and when a batch's tokens are on the host.
This process reads the file. Both read the same clock.

Written for SGLang 0.5.17. Environment variables reach it, for example SGLANG_MOE_CONFIG_DIR.
"""

import argparse
import os
import random
import struct
import tempfile
import time
from collections.abc import Callable
from itertools import dropwhile
from typing import Any, NamedTuple

from peer_work import generated  # beside this file

FILE = "MOESAIC_PEER_MARKS"  # environment variable: the file of the marks
RECORD = struct.Struct("<dcII")
CAME, PROMPTS, DECODES = b"C", b"P", b"D"  # kinds of marks
SPARE = 8  # places of a context that SGLang gives to no token
SOON_S = 5.0  # the last mark may be written a moment after the answers


class Mark(NamedTuple):
    now: float  # time.perf_counter()
    kind: bytes
    requests: int  # that came, or of the batch
    prompt_tokens: int  # that the batch computed


class SGLang:
    def __init__(self, folder: str, args: argparse.Namespace) -> None:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            os.environ.setdefault(name, "1")
        handle, self.path = tempfile.mkstemp(prefix="marks")
        os.close(handle)
        os.environ[FILE] = self.path
        import sglang

        self.name = f"SGLang {sglang.__version__}"
        self.args = args
        self.engine = sglang.Engine(
            model_path=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            random_seed=0,
            context_length=args.prompt + generated(args, args.prompt, max(args.batch)) + SPARE,
            disable_radix_cache=True,
            mem_fraction_static=0.8,
            max_running_requests=max(*args.batch, args.prefill_batch),
            chunked_prefill_size=args.step_tokens,
            max_prefill_tokens=args.step_tokens,
            cuda_graph_bs_decode=sorted({1, *args.batch}),
            skip_server_warmup=True,
        )
        self.vocab = self.engine.tokenizer_manager.model_config.vocab_size

    def drive(self, batch: int, max_tokens: int) -> list[Mark]:
        """Run `batch` requests to their end. Return the marks since they came."""
        ids = [[random.randrange(self.vocab) for _ in range(self.args.prompt)] for _ in range(batch)]
        begin = os.path.getsize(self.path)
        sampling = {"temperature": 0.0, "max_new_tokens": max_tokens, "ignore_eos": True}
        answers = self.engine.generate(input_ids=ids, sampling_params=sampling)
        if sum(answer["meta_info"]["completion_tokens"] for answer in answers) != batch * max_tokens:
            raise RuntimeError("SGLang: not every request has all its tokens")
        deadline = time.monotonic() + SOON_S
        while True:
            marks = read(self.path, begin)
            if sum(mark.prompt_tokens for mark in marks) == batch * self.args.prompt:
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"SGLang: the marks do not have all prompts: {marks[:8]}")
            time.sleep(0.01)
        if marks[0].requests != batch:
            raise RuntimeError(f"SGLang: the prompts did not come together: {marks[:8]}")
        return marks

    def prefill(self, batch: int) -> float:
        return prefill_rate(self.drive(batch, 1), batch * self.args.prompt)

    def decode(self, batch: int) -> float:
        return decode_rate(self.drive(batch, generated(self.args, self.args.prompt, batch)), batch)


def prefill_rate(marks: list[Mark], tokens: int) -> float:
    """Return prompt tokens per second, from the prompts' arrival to the last first token."""
    return tokens / (last_prompt(marks).now - marks[0].now)


def decode_rate(marks: list[Mark], batch: int) -> float:
    """Return tokens per second over the steps in which all requests decode: after the first, without the last one."""
    after = last_prompt(marks).now
    window = [mark.now for mark in marks if mark.kind == DECODES and mark.requests == batch and mark.now > after][:-1]
    return batch * (len(window) - 1) / (window[-1] - window[0])


def last_prompt(marks: list[Mark]) -> Mark:
    return [mark for mark in marks if mark.kind == PROMPTS][-1]


def read(path: str, begin: int) -> list[Mark]:
    """Return the marks from byte `begin` on, from the arrival of prompts.

    Before it may be a step of earlier requests: SGLang ends that one when the next requests are there. A mark is
    written in one call, so it is there whole or not at all.
    """
    with open(path, "rb") as file:
        file.seek(begin)
        marks = [Mark(*fields) for fields in RECORD.iter_unpack(file.read())]
    return list(dropwhile(lambda mark: mark.kind != CAME, marks))


def watch(randomize: Callable[[Any], None]) -> None:
    """Put our weights and the marks into SGLang, in its scheduler's process. Nothing, if no SGLang is measured."""
    if FILE not in os.environ:
        return
    from sglang.srt.managers import io_struct
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver
    from sglang.srt.model_loader import loader

    file = os.open(os.environ[FILE], os.O_WRONLY | os.O_APPEND)
    receive, process = SchedulerRequestReceiver.recv_requests, Scheduler.process_batch_result

    def mark(kind: bytes, requests: int, prompt_tokens: int = 0) -> None:
        os.write(file, RECORD.pack(time.perf_counter(), kind, requests, prompt_tokens))

    def receiving(self: Any) -> Any:
        came = receive(self)
        count = sum(
            len(message.batch) if isinstance(message, io_struct.BatchTokenizedGenerateReqInput) else 1
            for message in came or ()
            if isinstance(message, io_struct.BatchTokenizedGenerateReqInput | io_struct.TokenizedGenerateReqInput)
        )
        if count:
            mark(CAME, count)
        return came

    def processing(self: Any, batch: Any, result: Any) -> None:
        mode, requests = batch.forward_mode, len(batch.reqs)
        prompt_tokens = batch.extend_num_tokens or 0  # before the call, which may clear it
        process(self, batch, result)  # which waits until the tokens are on the host
        if mode.is_extend():
            mark(PROMPTS, requests, prompt_tokens)
        elif mode.is_decode():
            mark(DECODES, requests)

    loader.initialize_dummy_weights = randomize
    SchedulerRequestReceiver.recv_requests = receiving
    Scheduler.process_batch_result = processing
