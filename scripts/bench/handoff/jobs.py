"""The handoff between real jobs of run.py, each on its own GPUs: parts tokens, requests and kill.

In parts requests and kill the router runs in the benchmark's own process, and notes the time of every message. Their
model has random weights, DeepSeek-V3's KV (61 layers of 512 + 64) and little else. So its KV travels like V3's, but
its steps are far shorter.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Generator
from itertools import pairwise
from pathlib import Path
from statistics import median
from subprocess import Popen
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from disagg.control.messages import Parts
from disagg.control.ports import RouterPort
from disagg.front.answer import INTERRUPTED, Answer
from disagg.front.fleet import Replica
from disagg.front.parse import UserRequest
from disagg.front.router import Router
from disagg.front.source import Listed
from disagg.front.tokenizer import load_tokenizer
from disagg.front.tracked import Tracked
from disagg.request import Request
from model.checkpoint import checkpoint_table
from model.config import ModelConfig
from model.pages import PAGE
from parallel.mesh import pick_device
from scripts.tools.demo import MODEL, PROMPTS, ROOT, free_port, read_tokens

HOST = "127.0.0.1"
LINGER_S = 20  # until a job must have ended
TO_STREAM = 24  # requests at a steady rate
BURST = 16  # prompts in flight when the prefill job is killed
TALKERS = 4  # requests that decode throughout
THIN = {
    "model_type": "deepseek_v3",
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "moe_intermediate_size": 128,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 32768,
    "rope_theta": 10000,
}
SHORT = 64  # tokens of a talker's prompt
LONGEST = THIN["max_position_embeddings"] - SHORT  # tokens that a talker generates, or of another prompt


class Jobs:
    """Processes of run.py: one per rank, with the environment that torchrun would give it."""

    def __init__(self, args: Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.processes: dict[str, list[Popen]] = {}
        self.killed: list[Popen] = []

    def start(self, name: str, role: str, ranks: int, first_gpu: int, *flags: str) -> None:
        """Start a job. `first_gpu`: the job's first GPU; its ranks see the other GPUs after it, in order."""
        env = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": HOST, "MASTER_PORT": str(free_port())}
        env.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, because ranks share the cores
        if self.args.device == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
        elif torch.cuda.is_available():
            count = torch.cuda.device_count()
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[(first_gpu + i) % count] for i in range(count))
        command = [sys.executable, "run.py", "--role", role, *flags]
        self.processes[name] = []
        for rank in range(ranks):
            with self.log(name, rank).open("wb") as log:
                of_rank = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = Popen(command, cwd=ROOT, env=of_rank, stdout=log, stderr=log)
            self.processes[name].append(process)

    def log(self, name: str, rank: int) -> Path:
        return self.folder / f"{name}.{rank}.log"

    def kill(self, name: str) -> None:
        """Send SIGKILL to all ranks of a job, and forget the job.

        Does not wait, because a process that holds GPU memory takes a while to end.
        """
        for process in self.processes.pop(name):
            process.kill()
            self.killed.append(process)

    def failed(self) -> str | None:
        """Return the end of the log of a rank that failed; None if none did."""
        for name, ranks in self.processes.items():
            for rank, process in enumerate(ranks):
                if process.poll():
                    said = self.log(name, rank).read_text(errors="replace")[-3000:]
                    return f"rank {rank} of the {name} job ended with status {process.returncode}:\n{said}"
        return None

    def finish(self, limit_s: float) -> None:
        """Wait until all jobs have ended. Raises RuntimeError if one fails or is still running after `limit_s`."""
        deadline = time.monotonic() + limit_s
        while any(process.poll() is None for ranks in self.processes.values() for process in ranks):
            if problem := self.failed():
                raise RuntimeError(problem)
            if time.monotonic() > deadline:
                running = [name for name, ranks in self.processes.items() if any(p.poll() is None for p in ranks)]
                raise RuntimeError(f"still running after {limit_s:.0f} s: {', '.join(running)}")
            time.sleep(0.05)
        if problem := self.failed():
            raise RuntimeError(problem)

    def __enter__(self) -> "Jobs":
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.kill(name)
        for process in self.killed:
            process.wait()


def same_tokens(args: Namespace, limit_s: float) -> int:
    """Compare the shipped model's tokens from two jobs with those of one process. Return their number.

    In float32, because in bf16 the composition of a batch may change a token. Raises RuntimeError if tokens differ.
    """
    with tempfile.TemporaryDirectory() as scratch, Jobs(args, Path(scratch)) as jobs:
        apart, together = Path(scratch, "apart.jsonl"), Path(scratch, "together.jsonl")
        address = f"{HOST}:{free_port()}"
        engine = ("--model", MODEL, "--dtype", "float32", "--kv-tokens", "65536")
        tp = ("--attn-tp", str(args.prefill_tp))
        jobs.start("prefill", "prefill", args.pairs, 0, *engine, "--router", address, *tp)
        jobs.start("decode", "decode", args.pairs, args.pairs, *engine, "--router", address)
        work = ("--input", PROMPTS, "--output")
        jobs.start("router", "router", 1, 0, "--model", MODEL, "--router", address, *work, str(apart))
        jobs.start("unified", "unified", 1, 0, *engine, *work, str(together))
        jobs.finish(limit_s)
        expected, tokens = read_tokens(together), read_tokens(apart)
    if tokens != expected:
        raise RuntimeError(f"other tokens than unified's for {[i for i in expected if tokens.get(i) != expected[i]]}")
    return sum(map(len, tokens.values()))


def write_thin_model(folder: Path, layers: int, device: torch.device) -> ModelConfig:
    """Write a random checkpoint in bf16 with V3's KV and the shipped model's tokenizer."""
    raw = THIN | {"num_hidden_layers": layers, "first_k_dense_replace": layers}
    raw["vocab_size"] = ModelConfig.from_pretrained(ROOT / MODEL).vocab_size
    config = ModelConfig.from_dict(raw)
    generator = torch.Generator(device).manual_seed(0)

    def values(shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        return (drawn * shape[-1] ** -0.5).cpu()

    save_file({entry.name: values(entry.shape) for entry in checkpoint_table(config)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / MODEL / name, folder)
    return config


class Asker:
    """The client of one request. It keeps the answer under its position."""

    def __init__(self, position: int, answers: dict[int, Answer]) -> None:
        self.position, self._answers = position, answers

    def show(self, piece: str, tokens: list[int], logprobs: list) -> None:
        """Ignore it: `Watched` notes the time of every token."""

    def deliver(self, answer: Answer) -> None:
        self._answers[self.position] = answer


class Watched(Router):
    """A router that notes the time of every message, and submits requests over time.

    The requests come from `script`, a generator that advances each time the router has listened.
    """

    def __init__(self, jobs: Jobs, port: RouterPort, folder: Path, expected: int, deadline: float) -> None:
        tokenizer = load_tokenizer(folder).tokenizer
        super().__init__(port, tokenizer, tokenizer.get_vocab_size(), self._over)
        self.jobs, self.expected_replicas, self.deadline = jobs, expected, deadline
        self.script: Generator | None = None
        self.problem: str | None = None
        self.complete = False  # whether all replicas have joined
        self.tokens: dict[int, list[float]] = defaultdict(list)  # time of each token, by its client's position
        self.parts: dict[int, Parts] = {}
        self.answers: dict[int, Answer] = {}
        self.lost_at: list[float] = []
        self.retried: dict[int, float] = {}

    def _over(self) -> bool:
        self.problem = self.problem or self.jobs.failed()
        if time.monotonic() > self.deadline:
            self.problem = self.problem or "it took too long"
        return self.problem is not None or self.script is None

    def _assign(self) -> None:
        self.complete = self.complete or len(self.fleet.replicas) == self.expected_replicas
        if self.complete:
            super()._assign()

    def _listen(self, timeout_ms: int) -> None:
        super()._listen(min(timeout_ms, 1))
        if self.script is not None and next(self.script, self) is self:
            self.script = None

    def _add(self, tracked: Tracked, tokens: list[int], logprobs: list, now: float, parts: Parts | None = None) -> bool:
        position = tracked.client.position
        self.tokens[position] += [now] * len(tokens)
        if parts is not None:
            self.parts[position] = parts
        return super()._add(tracked, tokens, logprobs, now, parts)

    def _lose(self, lost: Replica, how: str) -> None:
        if not self.fleet.leaving:
            self.lost_at.append(time.monotonic())
        super()._lose(lost, how)

    def _retry(self, uid: int, failed: Replica) -> None:
        self.retried.setdefault(self._tracked[uid].client.position, time.monotonic())
        super()._retry(uid, failed)


def through_jobs(args: Namespace, kills: bool, limit_s: float) -> dict[str, Any]:
    """Send requests at a steady rate, beside some that decode throughout. Return the times found, in seconds.

    With `kills`, a burst of long prompts follows, during which one of two prefill jobs is killed.
    """
    deadline = time.monotonic() + limit_s
    with tempfile.TemporaryDirectory() as scratch, Jobs(args, Path(scratch)) as jobs:
        folder = Path(scratch, "thin")
        folder.mkdir()
        write_thin_model(folder, args.kv_layers, pick_device(args.device))
        port = RouterPort(HOST, 0)
        longest, chunk, output = max(args.prompts), min(args.prompts), args.talk
        prefills = ["prefill", "spare"] if kills else ["prefill"]
        engine = ("--model", str(folder), "--router", f"{HOST}:{port.port}", "--dtype", "bfloat16")
        engine += ("--max-tokens-per-step", str(chunk), "--max-batch", str(2 * BURST))
        for name in prefills:
            room = BURST * longest + TALKERS * (SHORT + PAGE)
            tp = ("--attn-tp", str(args.prefill_tp))
            jobs.start(name, "prefill", args.pairs, 0, *engine, "--kv-tokens", str(room), *tp)
        room = TALKERS * (SHORT + output + PAGE) + (BURST + TO_STREAM) * (longest + PAGE)
        jobs.start("decode", "decode", args.pairs, args.pairs, *engine, "--kv-tokens", str(room))

        replicas = args.pairs + len(prefills) * args.pairs // args.prefill_tp
        router = Watched(jobs, port, folder, replicas, deadline)
        vocab = ModelConfig.from_pretrained(folder).vocab_size
        generator = torch.Generator().manual_seed(0)

        def request(tokens: int, output: int) -> UserRequest:
            prompt = torch.randint(vocab, (tokens,), generator=generator).tolist()
            return UserRequest(0, Request(0, prompt, output, ignore_eos=True), [])

        lengths = [args.prompts[i % len(args.prompts)] for i in range(TO_STREAM)]
        stream = {TALKERS + i: request(tokens, 4) for i, tokens in enumerate(lengths)}
        burst = {TALKERS + TO_STREAM + i: request(longest, 4) for i in range(BURST)}
        moments: dict[str, float] = {}

        def script() -> Generator[None, None, None]:
            while not all(len(router.tokens[talker]) > 10 for talker in range(TALKERS)):
                yield
            moments["talking"] = time.monotonic()
            for i, (position, user) in enumerate(stream.items()):
                while time.monotonic() < moments["talking"] + i * args.interval:
                    yield
                router.submit(user, Asker(position, router.answers))
            while not stream.keys() <= router.answers.keys():
                yield
            if not kills:
                return
            for position, user in burst.items():
                router.submit(user, Asker(position, router.answers))
            while sum(bool(router.tokens[position]) for position in burst) < 2:
                yield
            moments["killed"] = time.monotonic()
            jobs.kill("prefill")
            while not burst.keys() <= router.answers.keys():
                yield
            moments["answered"] = time.monotonic()

        router.script = script()
        router.run(Listed((request(SHORT, output), Asker(i, router.answers)) for i in range(TALKERS)))
        port.close()
        if router.problem is not None:
            raise RuntimeError(router.problem)
        jobs.finish(LINGER_S)
    ended = [router.answers[talker].error for talker in range(TALKERS)]
    if early := [error for error in ended if error != INTERRUPTED]:
        raise RuntimeError(f"a request that decodes all the while ended early: {early[0] or 'more --talk'}")
    bad = [p for p in stream if router.answers[p].error]
    if bad:
        raise RuntimeError(f"{len(bad)} requests of the stream failed: {router.answers[bad[0]].error}")
    found = {"by length": by_length(router, dict(zip(stream, lengths, strict=True))), "table": router.metrics.table()}
    return found | (after_the_kill(router, moments, list(burst)) if kills else {})


def by_length(router: Watched, lengths: dict[int, int]) -> dict[int, dict[str, float]]:
    """Return the medians for each prompt length: TTFT, its parts, and the first decode step."""
    found = {}
    for length in sorted(set(lengths.values())):
        positions = [position for position, tokens in lengths.items() if tokens == length]
        rows = {"TTFT": [router.answers[p].ttft_s for p in positions]}
        rows |= {name: [getattr(router.parts[p], name) for p in positions] for name in Parts.__struct_fields__}
        rows["to and from the router"] = [
            router.answers[p].ttft_s - sum(getattr(router.parts[p], name) for name in Parts.__struct_fields__)
            for p in positions
        ]
        rows["first decode step"] = [router.tokens[p][1] - router.tokens[p][0] for p in positions]
        found[length] = {name: median(values) for name, values in rows.items()}
    return found


def after_the_kill(router: Watched, moments: dict[str, float], burst: list[int]) -> dict[str, Any]:
    """Return what the kill changed. "gap": the longest gap between two tokens of a request that decodes throughout.

    A gap during which the kill happens counts as after it.
    """
    killed = moments["killed"]

    def longest_gap(since: float, until: float) -> float:
        return max(b - a for talker in range(TALKERS) for a, b in pairwise(router.tokens[talker]) if since < b <= until)

    again = [router.tokens[p][0] - killed for p in router.retried if router.tokens[p]]
    return {
        "gap before": longest_gap(moments["talking"], killed),
        "gap after": longest_gap(killed, moments["answered"]),
        "noticed": min(router.lost_at) - killed,
        "retried": len(router.retried),
        "first retry": min(router.retried.values(), default=killed) - killed,
        "last of them answered": max(again, default=0.0),
        "errors": sum(router.answers[p].error is not None for p in burst),
        "error": next((router.answers[p].error for p in burst if router.answers[p].error), None),
    }
