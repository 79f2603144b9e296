"""The plan as text, and as an object for JSON."""

from dataclasses import asdict

from disagg.budget import GIB
from model.config import ModelConfig
from model.footprint import page_bytes
from model.pages import PAGE
from scripts.bench.lib.step_cost import tokens_per_step
from scripts.tools.plan.deployment import (
    MOST_LINKS,
    Deployment,
    Option,
    Options,
    apart,
    command,
    commands,
    router_command,
    unified,
)
from scripts.tools.plan.gpus import Gpu
from scripts.tools.plan.rank import ITEMSIZE, Traffic, as_run, budget, dispatch, tokens_of_a_decode_step
from scripts.tools.plan.rates import achieved, decode_step, mean_kv, prefill_step, records
from scripts.tools.plan.sizes import dense_ffn_split, least_redundant, splits

COLUMNS = ("role", "ranks", "attn TP", "redundant", "slots", "dispatch", "weights", "buffers", "activations", "graphs",
           "other", "KV", "KV tokens", "batch", "step ms", "rate")  # fmt: skip
WEIGHTS = ("attention", "dense FFN", "shared experts", "routed experts", "gates and norms", "embedding", "LM head")
DRAFT = "draft layer"  # in the tables of jobs that draft
PLACES = {"weights": (*WEIGHTS, DRAFT), "buffers": ("communication buffers", "KV handoff"),
          "activations": ("activations",), "graphs": ("CUDA graphs",)}  # fmt: skip
UNITS = {"prefill": "prompt_tokens", "decode": "generated_tokens", "unified": "requests"}


class Plan:
    """A plan for some GPUs and some traffic. `model` is what the commands name."""

    def __init__(
        self, config: ModelConfig, gpu: Gpu, gpus: int, per_host: int, traffic: Traffic, found: Options, model: str
    ) -> None:
        self.config, self.gpu, self.gpus, self.per_host = config, gpu, gpus, per_host
        self.traffic, self.found, self.model = traffic, found, model
        self.deployments = {"prefill and decode apart": apart(found, gpus), "unified": unified(found, gpus)}
        self.splits = list(splits(config, per_host, least_redundant(config, per_host), per_host))
        self.speculate = max(one.job.speculate for one in found.jobs)  # of every job
        self.tokens_per_step = tokens_per_step(self.speculate, traffic.accept)
        self.kv_token = page_bytes(config, ITEMSIZE) // PAGE  # bytes
        self.dense_ffn = {"prefill": dense_ffn_split(config, 2048, 0), "decode": dense_ffn_split(config, 128, 3)}

    def describe(self, one: Option) -> dict:
        """Return everything about a job: its sizes, the bytes of a rank by part, and the modelled rates."""
        job, config, gpu = one.job, self.config, self.gpu
        limits = budget(config, gpu, job)
        if job.role == "prefill":
            seconds = prefill_step(config, gpu, job, job.max_tokens_per_step, self.traffic.prompt)
        else:
            seconds = decode_step(config, gpu, job, job.max_batch, mean_kv(self.traffic))
        return {
            **asdict(job),
            "slots_per_rank": job.slots(config),
            "fp8": as_run(config, gpu, job.attn_tp).fp8,
            "dispatch": dispatch(config, gpu, job)[0],
            "bytes": limits.parts | {"KV": limits.left},
            "limit_bytes": limits.available,
            "kv_tokens": limits.most_pages * PAGE,
            "tokens_per_decode_step_and_rank": tokens_of_a_decode_step(config, job),
            "modelled": {
                "step_ms": 1e3 * seconds,
                f"{UNITS[job.role]}_per_second_and_rank": one.rate,
                "requests_per_second": one.requests,
            },
        }

    def as_object(self) -> dict:
        """Return the plan for JSON. All rates, times and ratios are below keys named `modelled`.

        `assumed`, if the jobs draft: what the rates are modelled from, and nobody measured.
        """
        assumed = {"a_draft_is_right": self.traffic.accept, "tokens_per_step": self.tokens_per_step}
        return {
            "gpu": {**asdict(self.gpu), "source": "ceilings: NVIDIA's data sheets; memory: as CUDA reports it"},
            "gpus": self.gpus,
            "traffic": {"prompt": self.traffic.prompt, "output": self.traffic.output},
            **({"speculate": self.speculate, "assumed": assumed} if self.speculate else {}),
            "kv_bytes_per_token": self.kv_token,
            "attention_tp_that_divides": self.splits,
            "dense_ffn_tp_by_formula": self.dense_ffn,
            "modelled_from": {
                phase: {"record": r["name"], "achieved": achieved(phase)} for phase, r in records().items()
            },
            "jobs": [self.describe(one) for one in self.found.jobs],
            "illegal": self.found.illegal,
            "too_small": self.found.too_small,
            "deployments": [
                {"name": name} | self._object(one) for name, one in self.deployments.items() if one is not None
            ],
        }

    def _object(self, one: Deployment) -> dict:
        return {
            "gpus": one.gpus,
            "jobs": [{"role": of.job.role, "ranks": of.job.ranks, "count": count} for of, count in one.sides],
            "modelled": {"requests_per_second": one.requests, "prefill_ranks_per_decode_rank": one.ratio},
            "commands": commands(one, self.model),
        }

    def as_text(self) -> str:
        config, gpu, sheet = self.config, self.gpu, self.gpu.ceilings
        fp8 = "no fp8" if sheet.fp8 is None else f"fp8 {sheet.fp8 / 1e12:,.0f} TFLOP/s"
        weights = "block fp8, kept" if as_run(config, gpu, 1).fp8 else "bf16" + ", dequantised" * config.fp8
        lines = [
            f"{self.gpus} x {gpu.name}: {gpu.memory / GIB:.1f} GiB as CUDA reports it; data sheet: bf16 "
            f"{sheet.bf16 / 1e12:,.0f} TFLOP/s, {fp8}, {sheet.bandwidth / 1e12:.2f} TB/s",
            f"requests: {self.traffic.prompt:,} + {self.traffic.output:,} tokens; KV: {self.kv_token:,} bytes per "
            f"token; weights: {weights}",
            f"attention TP that divides: {', '.join(map(str, self.splits))}",
        ]
        if config.first_k_dense_replace:
            by_phase = ", ".join(f"{size:.1f} ({phase})" for phase, size in self.dense_ffn.items())
            lines.append(f"dense FFN: least memory at TP {by_phase} by SGLang's formula; here it follows attention TP")
        if self.speculate:
            lines.append(
                f"drafts: {self.speculate} per step; KV: {config.num_hidden_layers} + 1 layers; a decode step has "
                f"batch x (1 + {self.speculate}) tokens. ASSUMED: a draft is right in {self.traffic.accept:.0%} of the "
                f"cases if those before it are, so a step gives {self.tokens_per_step:.3g} tokens"
            )
        lines += [
            "",
            "Jobs that fit, with the smallest attention TP that fits. GiB per rank; batch per attention replica.",
            "MODELLED per rank and second: prompt tokens (prefill), generated tokens (decode), requests (unified).",
            *_table([self._row(one) for one in self.found.jobs]),
        ]
        if self.found.illegal:
            ranks, rule = next(iter(self.found.illegal.items()))
            lines += ["", f"illegal: {', '.join(map(str, self.found.illegal))} ranks; {ranks}: {rule}"]
        if self.found.too_small:
            lines += ["", f"does not fit: {self.found.too_small[max(self.found.too_small)]}"]
        for name, one in self.deployments.items():
            if one is not None:
                lines += ["", *self._chosen(name, one)]
        drafting = ", and on an assumed acceptance" if self.speculate else ""
        about = ", ".join(f"{achieved(phase):.2f} ({phase})" for phase in records())
        lines += [
            "",
            "MODELLED: the roofline on the data sheet's ceilings, divided by the fraction that one H100 rank achieved,",
            f"{about}{drafting}. Plus the times that DeepEP's authors published, without overlap.",
            "Loads are even and queues full. Small steps achieve less, and NCCL takes longer than DeepEP.",
        ]
        return "\n".join(lines)

    def _row(self, one: Option) -> list[str]:
        job, seen = one.job, self.describe(one)
        sizes = seen["bytes"]
        shown = {place: sum(sizes.get(name, 0) for name in names) for place, names in PLACES.items()}
        other = sum(sizes.values()) - sum(shown.values()) - sizes["KV"]
        gib = [f"{size / GIB:.1f}" for size in (*shown.values(), other, sizes["KV"])]
        counts = map(str, (job.ranks, job.attn_tp, job.redundant, seen["slots_per_rank"]))
        over = "-" if job.ranks == 1 else "DeepEP" if seen["dispatch"].startswith("DeepEP") else "NCCL"
        rate = f"{one.rate:,.0f}" if one.rate >= 100 else f"{one.rate:.3g}"
        last = [f"{seen['kv_tokens']:,}", str(job.max_batch), f"{seen['modelled']['step_ms']:,.1f}", rate]
        return [job.role, *counts, over, *gib, *last]

    def _chosen(self, name: str, one: Deployment) -> list[str]:
        what = " + ".join(f"{count} {of.job.role} x {of.job.ranks} ranks" for of, count in one.sides)
        lines = [f"{name}: {what} = {one.gpus} GPUs, {one.requests:,.3g} requests/s (modelled)"]
        if one.ratio is not None:
            lines.append(f"prefill : decode, in ranks, for this traffic: {one.ratio:.3g} : 1 (modelled)")
        if one.links > MOST_LINKS:
            lines.append(
                f"warning: a rank has up to {one.links} links; over {MOST_LINKS}, one may wait for another's peer"
            )
        if one.prefill is not None:
            lines.append(f"$ {router_command(self.model)}")
        for of, count in one.sides:
            each = f", each on {of.job.hosts} hosts" if of.job.hosts > 1 else ""
            lines.append(f"{count} x {of.job.role}{each}; dispatch: {dispatch(self.config, self.gpu, of.job)[0]}")
            lines.append(f"$ {command(of.job, self.model)}")
        return lines


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in (COLUMNS, *rows)]
