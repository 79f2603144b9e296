"""The planner's numbers are the engine's own, reproduce published ones, and end in commands that run.py takes."""

import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch

from disagg.config import EngineConfig
from disagg.page_cache import PageCache
from disagg.scheduler import Scheduler
from model.config import ModelConfig
from model.footprint import StepShape, page_bytes, weight_bytes
from model.pages import PAGE
from parallel.deepep_sizes import Sizes, buffer_bytes
from run import parse_args
from scripts.bench.lib.measurements import load
from scripts.bench.lib.shapes import SHAPES
from scripts.bench.lib.step_cost import Ceilings
from scripts.tools.plan import __main__ as plan
from scripts.tools.plan.deployment import apart, commands, options, unified
from scripts.tools.plan.gpus import GPUS, Gpu
from scripts.tools.plan.rank import (
    Job,
    Traffic,
    as_run,
    best_split,
    budget,
    dispatch,
    fits,
    kv_pages,
    largest,
    least_gpus,
    longest_prompt,
    smallest,
    tokens_of_a_decode_step,
)
from scripts.tools.plan.rates import decode_step, output_rate, prefill_step
from scripts.tools.plan.report import DRAFT, WEIGHTS
from scripts.tools.plan.sizes import check_job, dense_ffn_split, job_sizes, least_redundant, splits
from tests.conftest import ROOT
from tests.test_memory import make, parameter_bytes

V3, H100, H200 = SHAPES["v3"], GPUS["h100"], GPUS["h200"]
EP72 = Job("decode", 72, 1, 32, max_batch=256, max_tokens_per_step=1024, max_model_len=2048)
TRAFFIC = Traffic(2000, 100)


def test_the_reports_decode_rank_is_reproduced() -> None:
    """DeepSeek-V3 on 72 H100s with 256 requests of 2,048 tokens per rank, as in SGLang's report: 30.3 + 36.8 = 67.2 GB.

    A GB is 10^9 bytes. By hand: fp8 matrices, kv_b, gates, embedding and LM head in bf16, and 4 of 288 experts. The
    hand count leaves out scales, norms and the gates' biases, which are under 0.1 % of it. Beside DeepEP's buffer of
    4 GiB there is just room for the 256 in 0.9 of the GPU: 260 do not fit.
    """
    limits = budget(V3, H100, EP72)
    weights = sum(limits.parts[name] for name in WEIGHTS)
    kv = 256 * 2048 * page_bytes(V3, 2) / PAGE
    assert page_bytes(V3, 2) / PAGE == 61 * 576 * 2 == 70_272
    assert round(weights / 1e9, 1) == 30.3 and round(kv / 1e9, 1) == 36.8 and round((weights + kv) / 1e9, 1) == 67.2
    assert EP72.slots(V3) == 4
    attention = 7168 * (1536 + 576) + 1536 * 128 * 192 + 128 * 128 * 7168 + 2 * 512 * 128 * 256
    by_hand = 61 * attention + 58 * (3 * 7168 * 2048 * (1 + 4) + 2 * 256 * 7168) + 3 * 3 * 7168 * 18432
    by_hand += 2 * 2 * 129280 * 7168
    assert by_hand < weights < 1.001 * by_hand
    assert fits(V3, H100, replace(EP72, max_batch=128), Traffic(4000, 96))
    assert fits(V3, H100, EP72, Traffic(2047, 1)) and not fits(V3, H100, replace(EP72, max_batch=260), Traffic(2047, 1))
    assert 256 * 32 < limits.most_pages < 1.01 * 256 * 32
    assert not fits(V3, H100, EP72, Traffic(4000, 96)) and fits(V3, H200, EP72, Traffic(4000, 96))


def test_what_drafts_add_to_a_rank_by_hand() -> None:
    """One draft on EP72: a layer of weights, a layer of KV, and twice the tokens of a decode step.

    The layer by hand: attention, a gate, 4 of 288 experts and the shared one as in any layer, and eh_proj in bf16.
    """
    config, job = V3.drafting(), replace(EP72, max_batch=128, max_model_len=4096)
    without, limits = budget(V3, H200, job), budget(config, H200, replace(job, speculate=1))
    attention = 7168 * (1536 + 576) + 1536 * 128 * 192 + 128 * 128 * 7168 + 2 * 512 * 128 * 256
    by_hand = attention + 3 * 7168 * 2048 * (1 + 4) + 2 * 256 * 7168 + 2 * 2 * 7168 * 7168
    assert by_hand < limits.parts["draft layer"] < 1.001 * by_hand and "draft layer" not in without.parts
    assert {name: limits.parts[name] for name in WEIGHTS} == {name: without.parts[name] for name in WEIGHTS}
    assert limits.page == PAGE * 62 * 576 * 2 and without.page == PAGE * 61 * 576 * 2
    assert tokens_of_a_decode_step(config, replace(job, speculate=1)) == 2 * 128
    assert limits.parts["communication buffers"] == pytest.approx(4 * 288 * 256 * (2 * 7168 + 224), rel=1e-4)
    assert (
        limits.parts["communication buffers"]
        == budget(V3, H200, replace(job, max_batch=256)).parts["communication buffers"]
    )
    # rope's tables go 3 x (1 + 1) positions further; the draft layer's experts have two maps more
    assert limits.parts["tables"] - without.parts["tables"] == 6 * 64 * 4 + 128 * 4 + (256 + 288) * 8


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_a_plan_that_drafts_is_one_that_starts(drafts: int) -> None:
    """Its steps hold every request's tokens, DeepEP has room for them, and its rates follow the assumed acceptance."""
    config = V3.drafting()
    found = options(config, H200, 16, TRAFFIC, 8, None, drafts)
    for one in found.jobs:
        job = one.job
        Scheduler(PageCache(65), job.max_batch, job.max_tokens_per_step, job.max_model_len, job.speculate)
        _, sizes = dispatch(config, H200, job)
        assert job.speculate == drafts == sizes.drafts
        assert job.role == "prefill" or sizes.capacity == job.max_batch * (1 + drafts) <= 1024
    least = smallest(config, "decode", 8, 8, 0, Traffic(60, 4), 8, drafts)
    assert largest(config, H200, least, Traffic(60, 4)).max_batch * (1 + drafts) <= 1024, "a replica of 8 has no more"
    short = smallest(config, "prefill", 8, 8, 0, Traffic(1, 4), 8, drafts)
    job = largest(config, H200, short, Traffic(1, 4))
    Scheduler(PageCache(65), job.max_batch, job.max_tokens_per_step, job.max_model_len, drafts)
    for line in commands(apart(found, 16), "DIR")[1:]:
        settings = EngineConfig.from_flags(parse_args(shlex.split(line.split(" run.py ")[1])))
        assert settings.speculate == drafts and not settings.adapts
    job = found.decode[0].job
    seconds = decode_step(config, H200, job, job.max_batch, 2050)
    assert seconds > decode_step(V3, H200, replace(job, speculate=0), job.max_batch, 2050)
    rates = [output_rate(config, H200, job, replace(TRAFFIC, accept=accept)) for accept in (0.0, 0.6, 1.0)]
    right = sum(0.6**place for place in range(drafts + 1))
    assert rates == pytest.approx([job.max_batch * tokens / seconds for tokens in (1, right, 1 + drafts)])


def test_what_drafts_add_to_the_communication_by_hand() -> None:
    """A step on a GPU that computes at once is transfers: of all rows in 58 layers, of a row per sequence and draft.

    Decode on 64 ranks: DeepEP's table has 173 and 314 us for 128 tokens. Of each, 22.2 us do not grow with the tokens.
    Prefill's times do all.
    """
    at_once, config = replace(H200, ceilings=Ceilings(inf, inf, inf)), V3.drafting()
    fixed = 173 - (314 - 173) / (2 * 7168 - (7168 + 224 + 16)) * (7168 + 224 + 16)
    assert fixed == pytest.approx(22.2, abs=0.05)
    single, whole = 173 + 314, 2 * fixed + 3 * (173 + 314 - 2 * fixed)
    job = replace(EP72, ranks=64, redundant=0, speculate=2)
    assert decode_step(config, at_once, job, 128, 2048) == pytest.approx((58 * whole + 2 * single) * 1e-6)
    ratio = (58 * 16384 + 2 * 4) / (58 * 16384)  # four prompts, two drafts after each
    plain = prefill_step(V3, at_once, replace(job, speculate=0), 16384, 4096)
    assert prefill_step(config, at_once, job, 16384, 4096) / plain == pytest.approx(ratio, rel=1e-9)
    wide = replace(job, attn_tp=8)  # one prompt is padded to eight rows: each rank dispatches one
    plain = prefill_step(V3, at_once, replace(wide, speculate=0), 16384, 16384)
    ratio = (58 * 2048 + 2 * 1) / (58 * 2048)
    assert prefill_step(config, at_once, wide, 16384, 16384) / plain == pytest.approx(ratio, rel=1e-9)


def test_decode_steps_that_draft_have_the_engines_sizes() -> None:
    """65 sequences with a draft each reach the rule's 128 tokens per rank. So the step must divide into two halves."""
    config, job = V3.drafting(), replace(EP72, max_batch=65, max_model_len=4096, speculate=1)
    assert tokens_of_a_decode_step(config, job) == 2 * 66
    assert tokens_of_a_decode_step(config, replace(job, max_batch=63)) == 2 * 63


@pytest.mark.parametrize("ranks", [12, 72])
def test_sizes_that_are_no_power_of_two_need_redundant_experts(ranks: int) -> None:
    """288 = 256 + 32 slots are 24 on each of 12 ranks, and 4 on each of 72."""
    check_job(V3, ranks, 1, 32)
    with pytest.raises(ValueError, match=rf"must be 0, not \(256 \+ 0\) % {ranks} = {256 % ranks}$"):
        check_job(V3, ranks, 1, 0)
    assert least_redundant(V3, ranks) == {12: 8, 72: 32}[ranks]
    check_job(V3, ranks, 1, least_redundant(V3, ranks))


def test_attention_tp_divides_ranks_heads_and_widths() -> None:
    assert list(splits(V3, 8, 0, 8)) == [1, 2, 4, 8]
    assert list(splits(V3, 12, 8, 8)) == [1, 2, 4], "3, 6 and 12 do not divide 128 heads"
    assert list(splits(V3, 32, 0, 8)) == [1, 2, 4, 8], "a replica stays within a host"
    with pytest.raises(ValueError, match=r"num_attention_heads % attn-tp must be 0, not 128 % 3 = 2"):
        check_job(V3, 12, 3, 8)
    with pytest.raises(ValueError, match=r"ranks % --attn-tp must be 0, not 12 % 8 = 4"):
        check_job(V3, 12, 8, 8)
    assert job_sizes(V3, 30, 8) == [1, 2, 4, 8, 16, 24] and job_sizes(V3, 6, 8) == [1, 2, 4, 6]


def test_the_dense_ffn_follows_the_published_formula() -> None:
    """TP 3 with 2,048 tokens and no graphs, TP 6 with 128 tokens and 3 copies for graphs."""
    assert dense_ffn_split(V3, 2048, 0) == pytest.approx(3, rel=1e-12)
    assert dense_ffn_split(V3, 128, 3) == pytest.approx(6, rel=1e-12)


@pytest.mark.parametrize(("ranks", "attn_tp", "gpu", "drafts"),
                         [(72, 1, H100, 1), (16, 4, H200, 0), (16, 2, GPUS["a100"], 0)])  # fmt: skip
def test_weights_are_those_of_the_model_that_would_be_built(ranks: int, attn_tp: int, gpu: Gpu, drafts: int) -> None:
    config = replace(V3, num_hidden_layers=5, drafts=drafts > 0)
    job = replace(EP72, ranks=ranks, attn_tp=attn_tp, redundant=least_redundant(config, ranks), speculate=drafts)
    run = as_run(config, gpu, attn_tp)
    assert run.fp8 == (gpu is not GPUS["a100"])
    slots = replace(run, n_routed_experts=256 + job.redundant)  # the gate aside, an expert per slot
    built = parameter_bytes(make(slots, ranks, attn_tp, torch.bfloat16, run.fp8, "meta"))
    built["gates and norms"] -= 2 * job.redundant * (7168 * 2 + 4)
    if drafts:
        built[DRAFT] -= job.redundant * (7168 * 2 + 4)
    parts = budget(config, gpu, job).parts
    assert {name: parts[name] for name in (*WEIGHTS, *[DRAFT] * drafts)} == built


def test_the_modelled_cluster_is_the_benchmarks() -> None:
    """It is fed with the same record, so the cluster's modelled rate comes out as it was recorded."""
    recorded = {record.name: record.value for record in load()}
    decode = next(v for name, v in recorded.items() if "EP72, decode 256 x 2048" in name and name.endswith(
        "arrivals (skew 1): tok/s a node, plain"))  # fmt: skip
    prefill = next(v for name, v in recorded.items() if "EP32, prefill 16384" in name and name.endswith(
        "arrivals (skew 1): tok/s a node, plain"))  # fmt: skip
    assert 8 * 256 / decode_step(V3, H100, EP72, 256, 2048) == pytest.approx(decode, rel=1e-4)
    job = replace(EP72, role="prefill", ranks=32)
    assert 8 * 16384 / prefill_step(V3, H100, job, 16384, 4096) == pytest.approx(prefill, rel=1e-4)
    assert decode_step(V3, H200, EP72, 256, 2048) < decode_step(V3, H100, EP72, 256, 2048)


@pytest.mark.parametrize("role", ["prefill", "decode", "unified"])
def test_the_largest_batch_fits_and_a_larger_one_does_not(role: str) -> None:
    for ranks, config in ((8, V3), (1, SHAPES["moonlight"])):
        job = best_split(config, H200, role, ranks, 0, TRAFFIC, 8)
        assert budget(config, H200, job).pages(kv_pages(job, TRAFFIC) * PAGE), "the engine would take it"
        if role != "prefill" and job.max_batch < 1024:
            assert not fits(config, H200, replace(job, max_batch=job.max_batch + 8), TRAFFIC)
    table = budget(V3, H200, best_split(V3, H200, role, 8, 0, TRAFFIC, 8)).parts
    assert bool(table["KV handoff"]) == (role != "unified") and bool(table["CUDA graphs"]) == (role != "prefill")
    assert table["communication buffers"]


def test_the_nearest_prompt_fits_and_a_longer_one_does_not() -> None:
    h20, traffic = GPUS["h20"], Traffic(160_000, 100)
    least = smallest(V3, "unified", 8, 8, 0, traffic, 8)
    most = longest_prompt(V3, h20, least, traffic)
    for prompt, fitting in ((most, True), (most + PAGE, False)):
        shorter = Traffic(prompt, 100)
        assert fits(V3, h20, replace(least, max_model_len=shorter.total), shorter) == fitting
    assert longest_prompt(V3, H200, least, traffic) == 160_000


def test_what_deepep_serves() -> None:
    """EP72 decodes over low latency, but normal mode does not know 72 ranks. Ranks of a half-full host are unequal."""
    job, plain = replace(EP72, ranks=8, redundant=0), "all-to-all over NCCL"
    assert dispatch(V3, H200, job) == ("DeepEP", Sizes(8, 8, 256, 7168, 8, 256, "bfloat16"))
    over_rdma = "DeepEP over RDMA between 9 machines of 8 ranks"
    assert dispatch(V3, H200, EP72)[0].startswith(f"{over_rdma}; in steps with prompts {plain} (normal mode: ranks on ")
    assert dispatch(V3, H200, replace(EP72, role="prefill"))[0].startswith(
        f"{plain} (DeepEP: ranks on several machines"
    )
    assert dispatch(V3, H200, replace(EP72, ranks=144))[0] == "DeepEP over RDMA between 18 machines of 8 ranks"
    assert dispatch(V3, H200, replace(job, per_host=4))[0].endswith("ranks of a machine must be 8, not 4)")
    assert dispatch(V3, H200, replace(EP72, ranks=16, per_host=6))[0].endswith("equally many ranks, numbered in a row)")
    assert "needs Hopper" in dispatch(V3, GPUS["a100"], job)[0]
    assert "hidden size must be one of" in dispatch(replace(V3, hidden_size=1024), H200, job)[0]
    low_latency = 4 * 288 * 256 * (2 * 7168 + 224)
    assert budget(V3, H200, EP72).parts["communication buffers"] == pytest.approx(low_latency, rel=1e-4)
    assert budget(V3, H200, replace(EP72, role="prefill")).parts["communication buffers"] == 0


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_deepeps_memory_by_hand(ranks: int) -> None:
    """Low latency: two regions that send and receive 288 slots x 128 rows. Normal: 10 channels x ranks x 256 rows."""
    low_latency = 4 * 288 * 128 * (2 * 7168 + 224)
    normal = 10 * ranks * 256 * (2 * 7168 + 8 + 128 * 12 + 512)
    sizes = Sizes(ranks, ranks, 288, 7168, 8, 128, "bfloat16")
    assert buffer_bytes(sizes) == pytest.approx(low_latency + normal, rel=1e-4)


def test_deepeps_memory_over_rdma_by_hand() -> None:
    """At 144 ranks: 8 peers x 720 rows over NVLink. 18 machines x 132 rows, to send and to receive, over RDMA.

    Normal mode and low latency share the memory for RDMA, so the larger one counts: low latency's from some batch on.
    """
    row = 2 * 7168 + 8 + 128 * 12 + 512
    nvlink, rdma = 10 * 8 * 720 * row, 10 * 18 * 132 * 2 * (row + 16)
    for capacity, shared in ((16, rdma), (256, 4 * 288 * 256 * (2 * 7168 + 224))):
        sizes = Sizes(144, 8, 288, 7168, 8, capacity, "bfloat16")
        assert buffer_bytes(sizes) == pytest.approx(nvlink + shared, rel=1e-4)


def test_gpus_at_least() -> None:
    """V3 in fp8 has 671 GB: 6 H200s hold it, 5 do not. In bf16, on A100s, it needs three hosts."""
    assert least_gpus(V3, H200).ranks == 6
    five = replace(EP72, role="unified", ranks=5, redundant=4, max_batch=1)
    assert sum(budget(V3, H200, five).parts[name] for name in WEIGHTS) > 0.9 * H200.memory
    assert least_gpus(V3, H100).ranks == 16 and least_gpus(V3, GPUS["a100"]).ranks == 24
    assert least_gpus(SHAPES["moonlight"], H100).ranks == 1
    assert least_gpus(replace(V3, hidden_size=2**20), H200) is None


def test_a_deployment_uses_the_gpus_that_there_are_and_its_commands_are_run_pys() -> None:
    for gpus in (24, 96):
        found = options(V3, H200, gpus, TRAFFIC, 8, None)
        for one in (apart(found, gpus), unified(found, gpus)):
            assert one.gpus <= gpus and one.requests > 0
            taken = {}
            for line in commands(one, "DIR"):
                words = shlex.split(line)
                args = parse_args(words[words.index("run.py") + 1 :])
                taken[args.role] = args
                if words[0] == "torchrun":
                    side = next(of.job for of, _ in one.sides if of.job.role == args.role)
                    hosts = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
                    assert hosts * int(words[words.index("--nproc-per-node") + 1]) == side.ranks
                    for name in ("attn_tp", "redundant_experts", "max_batch", "max_tokens_per_step", "max_model_len"):
                        assert getattr(args, name) == getattr(side, name.removesuffix("_experts"))
            assert set(taken) == ({"unified"} if one.prefill is None else {"router", "prefill", "decode"})
    pair = apart(found, 96)
    busy = [count * of.job.ranks for of, count in pair.sides]
    assert busy[0] / busy[1] == pytest.approx(pair.ratio, rel=0.5), "ranks are shared as the traffic wants it"
    long = apart(options(V3, H200, 96, Traffic(1000, 4000), 8, None), 96)
    assert long.ratio < 0.2 < pair.ratio, "long outputs want decode ranks"


def test_a_unified_job_spans_hosts_only_if_there_is_no_room_for_two_jobs() -> None:
    """16 H100s hold V3 once, 32 hold it twice."""
    one, two = (options(V3, H100, gpus, TRAFFIC, 8, None) for gpus in (16, 32))
    assert apart(one, 16) is None and unified(one, 16).decode.job.hosts == 2
    assert apart(two, 32).gpus == 32 and max(two.too_small) == 8 and "16 GPUs would hold it" in two.too_small[8]


def run_plan(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *flags: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["plan", *flags])
    code = plan.main()
    return code, *capsys.readouterr()


def test_the_text_and_the_json(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text, err = run_plan(capsys, monkeypatch, "v3", "--gpus", "16", "--gpu", "h200")
    assert (code, err) == (0, "") and "prefill : decode" in text and "KV: 70,272 bytes per token" in text
    rates = [line for line in text.splitlines() if "requests/s" in line]
    assert len(rates) == 2 and all("(modelled)" in line for line in rates)
    assert "does not fit: unified job of 4 x h200" in text and "6 GPUs would hold it" in text
    where = tmp_path / "config.json"
    where.write_text((Path(tiny) / "config.json").read_text())
    for model in (str(tiny), str(where)):
        code, out, err = run_plan(
            capsys, monkeypatch, model, "--gpus", "2", "--gpu", "h20", "--prompt", "64", "--output", "8", "--json"
        )
        seen = json.loads(out)
        assert (code, err) == (0, "") and {job["role"] for job in seen["jobs"]} == {"prefill", "decode", "unified"}
        for job in seen["jobs"]:
            assert sum(job["bytes"].values()) == job["limit_bytes"] and "modelled" in job
        assert [one["name"] for one in seen["deployments"]] == ["prefill and decode apart", "unified"]
        assert all(f" {model if model == str(tiny) else 'DIR'}" in one["commands"][-1] for one in seen["deployments"])


def test_what_is_assumed_of_drafts_is_said(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("v3", "--gpus", "16", "--gpu", "h200", "--speculate", "2")
    code, text, err = run_plan(capsys, monkeypatch, *flags)
    assert (code, err) == (0, "") and "KV: 71,424 bytes per token" in text and "and on an assumed acceptance" in text
    assert "ASSUMED: a draft is right in 60% of the cases if those before it are, so a step gives 1.96 tokens" in text
    seen = json.loads(run_plan(capsys, monkeypatch, *flags, "--accept", "0.8", "--json")[1])
    assert seen["speculate"] == 2 and seen["assumed"] == {
        "a_draft_is_right": 0.8,
        "tokens_per_step": pytest.approx(2.44),
    }
    jobs = [line for one in seen["deployments"] for line in one["commands"] if "torchrun" in line]
    assert len(jobs) == 3 and all(line.endswith(" --speculate 2") for line in jobs)
    without = json.loads(run_plan(capsys, monkeypatch, *flags[:-2], "--json")[1])
    assert "assumed" not in without and not any("--speculate" in " ".join(one["commands"]) for one in
                                                without["deployments"])  # fmt: skip


def test_a_plan_imports_no_torch() -> None:
    """Importing it takes longer than the whole plan."""
    program = (
        "import sys; from scripts.tools.plan.__main__ import main; code = main(); "
        "print(code, sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    flags = ("v3", "--gpus", "16", "--gpu", "h200")
    done = subprocess.run([sys.executable, "-c", program, *flags], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "prefill : decode" in done.stdout and done.stdout.splitlines()[-1] == "0 []", done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("v3", "--gpus", "4", "--gpu", "h200"), "routed experts 152.287"),
        (("v3", "--gpus", "4", "--gpu", "h200"), "= 125.820 GiB; 6 GPUs would hold it"),
        (("v3", "--gpus", "8", "--gpu", "h20", "--prompt", "160000"), "KV 10.484 (one request of 160000 + 100 tokens)"),
        (("v3", "--gpus", "8", "--gpu", "h200", "--prompt", "163840"), "= 163940 is over the model's max_position"),
        (("v3", "--gpus", "8", "--gpu", "h200", "--redundant-experts", "3"), "(256 + 3) % 8 = 3"),
        (("none", "--gpus", "8", "--gpu", "h200"), "MODEL none: no such folder or file, and no shape"),
        (("v3", "--gpus", "8", "--gpu", "b200"), "invalid choice: 'b200'"),
        (("v3", "--gpus", "0", "--gpu", "h200"), "'0' is not a whole number of at least 1"),
        (("v3", "--gpus", "1000000", "--gpu", "h200"), "--gpus is 1000000; it must be at most 100000"),
        (("v3", "--gpus", "9" * 9999, "--gpu", "h200"), "--gpus"),
        (("v3", "--gpu", "h200"), "--gpus"),
        (("v3", "--gpus", "8", "--gpu", "h200", "--speculate", "5"), "--speculate is 5; it must be at most 4"),
        (("v3", "--gpus", "8", "--gpu", "h200", "--accept", "60"), "--accept: '60' is not a number in [0, 1]"),
        (("v2", "--gpus", "8", "--gpu", "h200", "--speculate", "1"), "num_nextn_predict_layers is 0 or missing"),
        (("x" * 9999, "--gpus", "8", "--gpu", "h200"), "too long"),
        (("v3", "--gpus", "8", "--gpu", "h200", "--rate"), "--rate"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line(
    flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run_plan(capsys, monkeypatch, *flags)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("scripts/plan: error: ") and said in err


def test_absurd_sizes_cost_a_line_and_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = json.loads((ROOT / "model" / "tiny" / "config.json").read_text())
    big, where = 2**31 - 1, tmp_path / "config.json"
    absurd = [{name: big} for name in raw if type(raw[name]) is int]
    absurd += [
        {"n_routed_experts": 2**30, "n_group": 2**29, "topk_group": 2**28},
        {"n_routed_experts": 1024, "n_group": 1024, "topk_group": 512, "num_experts_per_tok": 500},
        {"max_position_embeddings": big, "num_hidden_layers": 1},
        dict.fromkeys(("hidden_size", "num_hidden_layers", "moe_intermediate_size", "vocab_size"), big),
    ]
    began = time.process_time()
    for change in absurd:
        where.write_text(json.dumps(raw | change))
        code, out, err = run_plan(capsys, monkeypatch, str(where), "--gpus", "8", "--gpu", "h200", "--prompt", "99")
        assert (code == 0 and out and not err) or (code == 2 and not out and err.count("\n") == 1), (change, out, err)
    assert time.process_time() - began < 20
    assert ModelConfig.from_dict(raw | absurd[-3]), "some of them are legal, and are planned"


ROW = re.compile(r"^\| [\w.,/ -]+ \| `(\w+)` \| ([\d,.]+) B \| ([\d,.]+) GB \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)


def test_the_table_of_models_is_the_arithmetic() -> None:
    """docs/models.md: parameters, bytes of one copy, and the smallest jobs that hold them."""
    rows = ROW.findall((ROOT / "docs" / "models.md").read_text())
    assert {name for name, *_ in rows} == SHAPES.keys() - {"tiny"}
    for name, parameters, size, *jobs in rows:
        config = SHAPES[name]
        shape = StepShape(config, 2, config.fp8, 1, 1, config.n_routed_experts, 1, None, whole_keys=True)
        assert f"{config.num_parameters / 1e9:,.1f}" == parameters, name
        assert f"{sum(weight_bytes(shape).values()) / 1e9:,.1f}" == size, name
        for gpu, told in zip((H100, H200), jobs, strict=True):
            job = least_gpus(config, gpu)
            assert job is not None
            flags = f", `--attn-tp {job.attn_tp}`" * (job.attn_tp > 1)
            flags += f", `--redundant-experts {job.redundant}`" * (job.redundant > 0)
            assert told == f"{job.ranks}{flags}", (name, gpu.name)
