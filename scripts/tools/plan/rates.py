"""Throughput, MODELLED. No figure here was measured at the size that it stands for.

    step = roofline on the data sheet's ceilings / achieved fraction + all dispatches and combines

The roofline is `scripts/bench/lib/step_cost.py`. The achieved fraction compares it with a committed record per phase:
the step of one rank on an H100. Small steps achieve less than these. Communication takes the times that DeepEP's
authors published (`deepep_times.py`), without overlap. Where NCCL serves instead, it takes longer, so there the rates
are too high.

A job that drafts (--speculate) takes a longer step, and gets more tokens of it: `tokens_per_step`, from an ASSUMED
acceptance.

Loads are even, queues are full, and the all-reduces of attention TP take no time.
"""

from functools import cache
from typing import Any

from model.config import ModelConfig
from scripts.bench.lib import step_cost
from scripts.bench.lib.shapes import SHAPES
from scripts.bench.lib.store import rows
from scripts.bench.one_rank import deepep_times
from scripts.tools.plan.gpus import GPUS, Gpu
from scripts.tools.plan.rank import Job, Traffic, as_run

RECORD = "one rank of v3 at {}, simulated arrivals (skew 1): the step, computation alone"
RECORDS = {
    "decode": RECORD.format("EP72, decode 256 x 2048"),
    "prefill": RECORD.format("EP32, prefill 16384 in 4096s"),
}


@cache
def records() -> dict[str, dict[str, Any]]:
    """Return the committed record of each phase, as a row of the store."""
    by_name = {row["name"]: row for row in rows()}
    return {phase: by_name[name] for phase, name in RECORDS.items()}


@cache
def achieved(phase: str) -> float:
    """Return the fraction of an H100's roofline (data sheet) that the recorded step reaches."""
    v3, sheet = SHAPES["v3"], GPUS["h100"].ceilings
    work = step_cost.decode(v3, 256, 2048, 72, 4) if phase == "decode" else step_cost.prefill(v3, 16384, 4096, 32, 9)
    return work.seconds(sheet) / (records()[phase]["value"] * 1e-3)


def decode_step(config: ModelConfig, gpu: Gpu, job: Job, batch: int, kv: float) -> float:
    """Return the seconds of a decode step of `batch` requests per replica, which attend to `kv` tokens on average."""
    run = as_run(config, gpu, job.attn_tp)
    work = step_cost.decode(run, batch, kv, job.ranks, job.slots(config), job.attn_tp, job.speculate)
    sent = _transfers(run, job, "decode", batch * (1 + job.speculate), batch)
    return work.seconds(gpu.ceilings) / achieved("decode") + sent


def prefill_step(config: ModelConfig, gpu: Gpu, job: Job, tokens: int, prompt: int) -> float:
    """Return the seconds of a step of `tokens` prompt tokens per replica, of prompts of `prompt` tokens."""
    run = as_run(config, gpu, job.attn_tp)
    work = step_cost.prefill(run, tokens, prompt, job.ranks, job.slots(config), job.attn_tp, job.speculate)
    sent = _transfers(run, job, "prefill", tokens, -(-tokens // prompt))
    return work.seconds(gpu.ceilings) / achieved("prefill") + sent


def _transfers(config: ModelConfig, job: Job, phase: str, tokens: int, sequences: int) -> float:
    """Return the seconds of a step's dispatches and combines.

    The draft layer's are those of one token of each of the `sequences`, for every draft. Filling its KV has none.
    """
    if job.ranks == 1:
        return 0.0
    delays = (deepep_times.low_latency if phase == "decode" else deepep_times.normal)(config, job.ranks)
    whole, single = (
        sum(delays(what, -(-count // job.attn_tp)).total for what in ("dispatch", "combine"))
        for count in (tokens, sequences)
    )
    return config.num_moe_layers * whole + job.speculate * single


def prompt_rate(config: ModelConfig, gpu: Gpu, job: Job, traffic: Traffic) -> float:
    """Return prompt tokens per second and rank, in full steps."""
    tokens = max(job.max_tokens_per_step, job.attn_tp)
    return tokens / prefill_step(config, gpu, job, tokens, traffic.prompt) / job.attn_tp


def output_rate(config: ModelConfig, gpu: Gpu, job: Job, traffic: Traffic) -> float:
    """Return generated tokens per second and rank, with the largest batch halfway through its outputs."""
    tokens = job.max_batch * step_cost.tokens_per_step(job.speculate, traffic.accept)
    return tokens / decode_step(config, gpu, job, job.max_batch, mean_kv(traffic)) / job.attn_tp


def mean_kv(traffic: Traffic) -> float:
    """Return the tokens that a request attends to, averaged over its output."""
    return traffic.prompt + traffic.output / 2
