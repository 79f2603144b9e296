"""The memory of one rank of a job, and the largest batch that fits: `disagg/memory.py`'s table, before there is a GPU.

Where the engine's table depends on the installed libraries, the plan takes those that README.md names for Hopper.
"""

from dataclasses import dataclass, replace
from functools import partial

from disagg.buckets import make_buckets
from disagg.budget import Budget, plan_parts, share_of_gpu
from disagg.config import EngineConfig
from disagg.handoff import credits
from kernels.rooms import ALIGNMENT
from model.config import ModelConfig
from model.divisibility import fp8_misfit
from model.footprint import StepShape, page_bytes
from model.pages import pages_for
from parallel import deepep_sizes
from parallel.overlap_rule import Rule
from scripts.tools.plan.gpus import Gpu
from scripts.tools.plan.sizes import job_sizes, least_redundant, splits

DTYPE, ITEMSIZE = "bfloat16", 2  # of activations; bytes
DEFAULTS = EngineConfig()
PROMPT_STEPS = (16384, 8192, 4096, 2048, 1024, 512)  # tokens per step of a prefill job, the best first
MOST_BATCH = deepep_sizes.MAX_CAPACITY  # requests per rank that are considered


@dataclass(frozen=True)
class Job:
    """A job's arrangement and sizes. Those below `redundant` are per attention replica, as in run.py."""

    role: str  # unified, prefill, decode
    ranks: int
    attn_tp: int
    redundant: int
    max_batch: int
    max_tokens_per_step: int
    max_model_len: int
    per_host: int = 8
    speculate: int = 0  # drafts per step

    @property
    def hosts(self) -> int:
        return -(-self.ranks // self.per_host)

    @property
    def ranks_per_node(self) -> int | None:
        """Ranks on each host; None if the last one has fewer."""
        on_each = min(self.ranks, self.per_host)
        return None if self.ranks % on_each else on_each

    def slots(self, config: ModelConfig) -> int:
        """Return the slots per rank."""
        return (config.n_routed_experts + self.redundant) // self.ranks


def as_run(config: ModelConfig, gpu: Gpu, attn_tp: int) -> ModelConfig:
    """Return the configuration with `fp8` as the engine decides: kept, or dequantised to bf16."""
    return replace(config, fp8=config.fp8 and gpu.hopper and fp8_misfit(config, attn_tp, DTYPE) is None)


def dispatch(config: ModelConfig, gpu: Gpu, job: Job) -> tuple[str, deepep_sizes.Sizes | None]:
    """Return what serves dispatch, for the reader, and DeepEP's sizes (None: it does not serve)."""
    if job.ranks == 1:
        return "none: one rank", None
    sizes = deepep_sizes.Sizes(
        job.ranks,
        job.ranks_per_node,
        config.n_routed_experts + job.redundant,
        config.hidden_size,
        config.num_experts_per_tok,
        tokens_of_a_decode_step(config, job),
        DTYPE,
        job.speculate,
    )
    plain = "all-to-all over NCCL"
    why = deepep_sizes.misfits(sizes, job.role != "prefill")
    if not gpu.hopper:
        why.append("needs Hopper")
    if why:
        return f"{plain} (DeepEP: {'; '.join(why)})", None
    return deepep_sizes.described(sizes, plain), sizes


def _buckets(config: ModelConfig, job: Job) -> list[int]:
    rule = Rule(DEFAULTS.overlap, job.ranks, job.attn_tp, config.expert_share)
    return make_buckets(job.max_batch, partial(rule.row_multiple, each=1 + job.speculate))


def tokens_of_a_decode_step(config: ModelConfig, job: Job) -> int:
    """Return the most tokens that a rank dispatches in a decode step: of each sequence its latest, and its drafts."""
    return _buckets(config, job)[-1] * (1 + job.speculate) // job.attn_tp


def budget(config: ModelConfig, gpu: Gpu, job: Job) -> Budget:
    """Return the memory budget of one of the job's ranks, as the engine computes it at its start.

    `config`: of a job that drafts, `ModelConfig.drafting`, as in the engine.
    """
    assert config.drafts == (job.speculate > 0)
    sizes = {"max_batch": job.max_batch, "max_tokens_per_step": job.max_tokens_per_step}
    settings = EngineConfig(**sizes, max_model_len=job.max_model_len, speculate=job.speculate)
    _, deepep = dispatch(config, gpu, job)
    shape = StepShape(
        config,
        ITEMSIZE,
        as_run(config, gpu, job.attn_tp).fp8,
        job.attn_tp,
        job.ranks,
        job.slots(config),
        ALIGNMENT,
        None if deepep is None else deepep_sizes.padded(deepep.capacity, deepep.ranks),
        whole_keys=gpu.hopper,
        normal=deepep is None or not deepep_sizes.normal_misfits(deepep),
    )
    buffers = 0 if deepep is None else deepep_sizes.buffer_bytes(deepep)
    page = page_bytes(config, ITEMSIZE)
    parts = plan_parts(
        shape,
        buffers,
        _buckets(config, job),
        job.max_tokens_per_step,
        settings.positions(config),
        settings.longest(config),
        captures_decodes=job.role != "prefill",
        handoff=credits.buffer_bytes(page) if job.role != "unified" else 0,
        drafts=settings.drafts_per_step,
        prompts=() if job.ranks > 1 else settings.prompt_sizes(config),
        decodes=job.role != "prefill",
    )
    limit, why = share_of_gpu(gpu.memory, gpu.memory, 0, DEFAULTS.gpu_memory_fraction, 1)
    return Budget(limit, why, parts, page)


@dataclass(frozen=True)
class Traffic:
    """Tokens per request."""

    prompt: int
    output: int
    accept: float = 0.6  # ASSUMED: how likely a draft is right if those before it are. SGLang's report takes 60 %.

    @property
    def total(self) -> int:
        return self.prompt + self.output


def kv_pages(job: Job, traffic: Traffic) -> int:
    """Return the pages that the job's largest batch needs. A prefill job keeps prompts only."""
    return job.max_batch * pages_for(traffic.prompt if job.role == "prefill" else traffic.total)


def fits(config: ModelConfig, gpu: Gpu, job: Job, traffic: Traffic) -> bool:
    return budget(config, gpu, job).most_pages >= kv_pages(job, traffic)


def smallest(
    config: ModelConfig,
    role: str,
    ranks: int,
    attn_tp: int,
    redundant: int,
    traffic: Traffic,
    per_host: int,
    speculate: int = 0,
) -> Job:
    """Return a job for one request at a time: the least memory that a rank needs."""
    tokens = PROMPT_STEPS[-1] if role == "prefill" else DEFAULTS.max_tokens_per_step
    return Job(role, ranks, attn_tp, redundant, 1, tokens, traffic.total, per_host, speculate)


def largest(config: ModelConfig, gpu: Gpu, least: Job, traffic: Traffic) -> Job | None:
    """Return `least` with the sizes that serve the most, or None if it does not fit itself.

    A prefill job gets the largest step whose prompts it can hold twice: in one step they are computed, while those of
    the step before travel. Other jobs get the largest batch. No job gets more requests than a step holds the tokens of
    as they decode, which the engine demands.
    """
    if not fits(config, gpu, least, traffic):
        return None
    if least.role == "prefill":
        for tokens in PROMPT_STEPS:
            batch = min(2 * -(-tokens // traffic.prompt), tokens // (1 + least.speculate))
            steps = replace(least, max_tokens_per_step=tokens, max_batch=batch)
            if fits(config, gpu, steps, traffic):
                return steps
        return least
    most = min(MOST_BATCH * least.attn_tp, least.max_tokens_per_step) // (1 + least.speculate)
    low, high = 1, most + 1  # `low` fits, `high` is too many
    while high - low > 1:
        middle = (low + high) // 2
        if fits(config, gpu, replace(least, max_batch=middle), traffic):
            low = middle
        else:
            high = middle
    round_to = 8 * least.attn_tp
    return replace(least, max_batch=low // round_to * round_to or low)


def best_split(
    config: ModelConfig,
    gpu: Gpu,
    role: str,
    ranks: int,
    redundant: int,
    traffic: Traffic,
    per_host: int,
    speculate: int = 0,
) -> Job | None:
    """Return the job with the smallest attention TP that fits, at its largest sizes. None: none fits."""
    for attn_tp in splits(config, ranks, redundant, per_host):
        least = smallest(config, role, ranks, attn_tp, redundant, traffic, per_host, speculate)
        if (job := largest(config, gpu, least, traffic)) is not None:
            return job
    return None


def least_gpus(
    config: ModelConfig,
    gpu: Gpu,
    role: str = "unified",
    traffic: Traffic = Traffic(4000, 96),
    per_host: int = 8,
    speculate: int = 0,
) -> Job | None:
    """Return the smallest job that holds the configuration and one request, or None if none does.

    Its `ranks` are "GPUs at least". On one host, numbers of ranks that are no power of two count as well.
    """
    sizes = {*range(1, per_host + 1), *job_sizes(config, max(config.n_routed_experts, per_host), per_host)}
    for ranks in sorted(sizes):
        redundant = least_redundant(config, ranks)
        for attn_tp in splits(config, ranks, redundant, per_host):
            job = smallest(config, role, ranks, attn_tp, redundant, traffic, per_host, speculate)
            if fits(config, gpu, job, traffic):
                return job
    return None


def longest_prompt(config: ModelConfig, gpu: Gpu, least: Job, traffic: Traffic) -> int:
    """Return the longest prompt with which `least` fits, up to the traffic's; 0 if none."""
    low, high = 0, traffic.prompt + 1  # `low` fits, `high` does not
    while high - low > 1:
        shorter = Traffic((low + high) // 2, traffic.output)
        if fits(config, gpu, replace(least, max_model_len=shorter.total), shorter):
            low = shorter.prompt
        else:
            high = shorter.prompt
    return low


def refusal(config: ModelConfig, gpu: Gpu, least: Job, traffic: Traffic) -> str:
    """Return why the job `least` does not fit, as a sum, and the nearest that would."""
    limits = budget(config, gpu, least)
    pages = kv_pages(least, traffic)
    asked = f"one request of {traffic.prompt} + {traffic.output} tokens"
    hints = []
    if prompt := longest_prompt(config, gpu, least, traffic):
        hints.append(f"prompts of at most {prompt} tokens would fit")
    enough = least_gpus(config, gpu, least.role, traffic, least.per_host, least.speculate)
    if enough is not None:
        hints.append(f"{enough.ranks} GPUs would hold it (attention TP {enough.attn_tp})")
    nearest = "; ".join(hints) or "more GPUs do not help: every rank holds the parts that are not split"
    where = f"{least.role} job of {least.ranks} x {gpu.name}, attention TP {least.attn_tp}"
    return f"{where}: {limits.excess(pages, asked)}; {nearest}"
