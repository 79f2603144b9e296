"""Measure a decode step that drafts, on one rank of a large deployment, with SIMULATED arrivals and FORCED acceptance.

python -m scripts.bench.one_rank.drafts --ep 72 --batch 128 --kv 4096 --speculate 1 --accept 0.6

The step does on the device what `disagg/speculation.py` does: the model verifies N drafts of each sequence together
with its latest token, and the draft layer's KV is filled for all these rows. Then that layer makes N new drafts, one
after the other, with a row per sequence each. On a GPU all of it is one CUDA graph, where the engine has several. A
draft counts as right by a seeded draw (`forced.py`), because weights are random. Sequences stay where they are, so each
step attends to the same tokens.

The same rank's step without drafts runs in turns with it. Attention with N + 1 tokens of a sequence, and with one, is
profiled in each. Both steps run as one micro-batch. An engine may run the model's part of each as two that overlap;
that is not measured here. At the end the throughput of a cluster of such ranks is MODELLED: the step, plus all
dispatches and combines by deepep_times.py, without overlap. Its tokens follow from --accept.
"""

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from model.batch import Batch
from model.pages import pages_for
from model.sampling import likeliest
from scripts.bench.lib import roofline
from scripts.bench.lib.flags import SIZES, positive, probability
from scripts.bench.lib.forced import ForcedAcceptance
from scripts.bench.lib.measurements import Measurement, Report, save
from scripts.bench.lib.refusals import refusals
from scripts.bench.lib.step_cost import tokens_per_step
from scripts.bench.one_rank import deepep_times
from scripts.bench.one_rank.loopback import LoopbackMasked
from scripts.bench.one_rank.rank import (
    Rank,
    RankStep,
    add_flags,
    add_measuring_flags,
    captured,
    check_decode,
    check_flags,
    times,
)
from scripts.bench.one_rank.run import Ranges

PAPER = 17_373  # tok/s per node of 8 H100s: SGLang's report, which simulates its drafts and takes 60 % as right
SETTING = "SGLang's report, simulated: EP72, batch 128, KV 4,096, 60 % right"


class DraftingStep:
    """The device's part of a step that verifies and drafts, at the same place in every step."""

    def __init__(self, rank: Rank, batch: int, kv: int, drafts: int, accept: float) -> None:
        """`kv`: the tokens that the last one of a sequence attends to, its drafts included."""
        self.model, self.pool, self.drafts = rank.model, rank.pool, drafts
        config, each, width = rank.config, 1 + drafts, pages_for(kv)
        most = batch * each
        self.dispatcher = LoopbackMasked(
            rank.even, most, rank.ep * most, config.hidden_size, rank.ops, rank.device, config.fp8, rank.dtype
        )
        pages = 1 + torch.arange(batch * width, device=rank.device, dtype=torch.int32)
        self.table, self.accepted = pages.view(batch, width), ForcedAcceptance(accept, rank.device)
        # The draft layer looks up to N - 1 tokens further than the model.
        self.start = torch.full((batch,), kv - drafts - each, device=rank.device)
        self.tokens = torch.zeros(batch, each, dtype=torch.int64, device=rank.device)

    @torch.inference_mode()
    def run(self) -> Tensor:
        """Run the step. Returns how many drafts of each sequence are taken as right [B]."""
        model, count, each = self.model, len(self.tokens), self.drafts + 1
        places = self.start[:, None] + torch.arange(each, device=self.start.device)
        batch = Batch.decode(self.tokens.flatten(), places.flatten(), self.table)
        hidden = model.head.norm(model.body(batch, self.pool, self.dispatcher))
        own = likeliest(model.head.project(hidden)).view(count, each)
        right = self.accepted(self.tokens[:, 1:], own)
        following = replace(batch, token_ids=own.flatten().clamp(min=0))
        model.fill_draft(hidden, following, self.pool)
        state = hidden[torch.arange(count, device=right.device) * each + right]
        front = [own.gather(1, right[:, None])[:, 0].clamp(min=0)]
        for place in range(self.drafts):
            latest = Batch.decode(front[-1], self.start + right + place, self.table)
            state = model.draft(state, latest, self.pool, self.dispatcher)
            front.append(likeliest(model.head.project(state)).clamp(min=0))
        self.tokens.copy_(torch.stack(front, 1))
        return right

    def prepared(self) -> RankStep:
        """Return the step. On a GPU it replays a CUDA graph."""
        if self.tokens.device.type != "cuda":
            self.run()
            return RankStep(self.run, self.run)
        graph = captured(self.run)
        return RankStep(graph.replay, self.run)


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_flags(add, 72)
    add_measuring_flags(add)
    for name, default in (("batch", 128), ("kv", 4096)):
        add(f"--{name}", type=positive, default=default, help=f"{SIZES[name]} ({default})")
    add("--speculate", type=positive, default=1, metavar="N", help="drafts per step (1)")
    add("--accept", type=probability, default=0.6, help="FORCED acceptance: how likely a draft counts as right (0.6)")
    return parser, parser.parse_args()


def attention_of(ranges: Ranges, step: RankStep, rank: Rank) -> float:
    """Return the milliseconds of attention itself in a layer with experts, profiled in a step without a graph."""
    step.eager()
    return ranges.times(step.eager, rank.device, None)["moe:MLA core"] / rank.config.num_moe_layers


def cluster_ms(args: argparse.Namespace, rank: Rank, step: float, drafts: int) -> float:
    """Return the milliseconds of a step in the cluster, MODELLED: with all dispatches and combines, one by one.

    In the model's layers they are those of all rows, and in the draft layer those of a row per sequence for each draft.
    """
    delays = deepep_times.low_latency(rank.config, args.ep)
    whole, single = (
        1e3 * sum(delays(what, tokens).total for what in ("dispatch", "combine"))
        for tokens in (args.batch * (1 + drafts), args.batch)
    )
    return step + rank.config.num_moe_layers * whole + drafts * single


def prepare(args: argparse.Namespace, ranges: Ranges) -> tuple[roofline.Ceilings | None, Rank]:
    """Return the GPU's ceilings and the rank. Raises ValueError for flags that cannot work."""
    config, device = check_flags(args, num_nextn_predict_layers=1, drafts=True)
    check_decode(config, [args.batch], args.kv)
    if args.kv <= 2 * args.speculate + 1:
        least = 2 * (args.speculate + 1)
        raise ValueError(f"--kv {args.kv}: with {args.speculate} drafts it must be at least {least}")
    ceilings = None
    if device.type == "cuda":
        ceilings = roofline.measure_ceilings()
        torch.cuda.empty_cache()
    return ceilings, Rank(args, config, device, args.kv, args.batch * pages_for(args.kv), ranges.of_ops)


@torch.inference_mode()
def main() -> None:
    parser, args = parse()
    ranges = Ranges()
    with refusals(parser):
        ceilings, rank = prepare(args, ranges)
    ranges.of_model(rank.model)
    drafting = DraftingStep(rank, args.batch, args.kv, args.speculate, args.accept)
    steps = {args.speculate: drafting.prepared(), 0: rank.decode(args.batch, args.kv)}
    took = times({str(drafts): step.run for drafts, step in steps.items()}, rank.device, args.repeat)
    report = Report()
    rates: dict[int, float] = {}
    of = f"one rank of {args.shape} at EP{args.ep}, decode {args.batch} x {args.kv}, simulated arrivals"
    for drafts, step in sorted(steps.items()):
        what = f"{of} (skew {args.skew:g}), drafts: {drafts}" + f", forced acceptance {args.accept:g}" * (drafts > 0)
        ms = took[str(drafts)]
        work = roofline.decode(rank.config, args.batch, args.kv, args.ep, rank.local, drafts=drafts, accept=args.accept)
        floor = None if ceilings is None else round(1e3 * work.seconds(ceilings), 3)
        source = "roofline, same run (modelled)" if floor else ""
        name = f"{what}: the step, computation alone"
        report.keep(Measurement(name, round(ms, 3), "ms", "lower", floor, source))
        for layer in rank.model.layers:
            if layer.is_moe:
                layer.mlp.beside.stream = None  # kernels side by side slow each other
        core = attention_of(ranges, step, rank)
        report.keep(Measurement(f"{what}: MLA core of {1 + drafts} tokens, a MoE layer", round(core, 4), "ms", "lower"))
        each = tokens_per_step(drafts, args.accept)
        rates[drafts] = deepep_times.NODE * args.batch * each / cluster_ms(args, rank, ms, drafts) * 1e3
        paper = PAPER if drafts and args.shape == "v3" else None
        name, source = f"{what}: tok/s a node, plain", SETTING if paper else ""
        report.keep(Measurement(name, round(rates[drafts]), "tok/s", "higher", paper, source, kind="modelled"))
    beside = Measurement(
        f"{what}: tok/s a node, plain, against no drafts", round(rates[args.speculate]), "tok/s", "higher",
        round(rates[0]), "no drafts, same run (modelled)", kind="modelled",
    )  # fmt: skip
    report.keep(beside)
    if args.out is not None:
        save(report.records, args.out)


if __name__ == "__main__":
    main()
