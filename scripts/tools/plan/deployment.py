"""A deployment: prefill and decode jobs on some GPUs for some traffic, or one unified job; and their commands."""

import shlex
from dataclasses import dataclass

from model.config import ModelConfig
from scripts.tools.plan.gpus import Gpu
from scripts.tools.plan.rank import Job, Traffic, best_split, fits, refusal, smallest
from scripts.tools.plan.rates import output_rate, prompt_rate
from scripts.tools.plan.sizes import check_job, job_sizes, least_redundant, splits

MOST_LINKS = 31  # per rank and GPU; docs/usage.md says why
ROUTER = "ROUTER_HOST:7000"
ACCESS = ["--secret-file", "SECRET"]  # of jobs that other machines reach


@dataclass(frozen=True)
class Option:
    """A job that fits, with the modelled requests per second of all its ranks together."""

    job: Job
    rate: float  # per second and rank: prompt tokens (prefill), generated tokens (decode) or requests (unified)
    requests: float


@dataclass(frozen=True)
class Deployment:
    """Jobs of one kind per role. Without prefill, `decode` is a unified job, and its replicas are independent."""

    prefill: Option | None
    decode: Option
    prefill_jobs: int
    decode_jobs: int

    @property
    def sides(self) -> list[tuple[Option, int]]:
        """The kinds of jobs, and how many there are of each."""
        sides = ((self.prefill, self.prefill_jobs), (self.decode, self.decode_jobs))
        return [(one, count) for one, count in sides if one is not None]

    @property
    def gpus(self) -> int:
        return sum(count * one.job.ranks for one, count in self.sides)

    @property
    def requests(self) -> float:
        """Requests per second, modelled: those of the slower side."""
        return min(count * one.requests for one, count in self.sides)

    @property
    def ratio(self) -> float | None:
        """How many prefill ranks keep one decode rank busy, modelled. None: the jobs are unified."""
        if self.prefill is None:
            return None
        return (self.decode.requests / self.decode.job.ranks) / (self.prefill.requests / self.prefill.job.ranks)

    @property
    def links(self) -> int:
        """The most links of a rank: one to each rank of the other side."""
        return max(count * one.job.ranks for one, count in self.sides) if self.prefill is not None else 0


def option(config: ModelConfig, gpu: Gpu, job: Job, traffic: Traffic) -> Option:
    """Return the job with its modelled rates."""
    if job.role == "prefill":
        rate = prompt_rate(config, gpu, job, traffic)
        return Option(job, rate, job.ranks * rate / traffic.prompt)
    generating = output_rate(config, gpu, job, traffic)
    if job.role == "decode":
        return Option(job, generating, job.ranks * generating / traffic.output)
    seconds = traffic.prompt / prompt_rate(config, gpu, job, traffic) + traffic.output / generating  # of one rank
    return Option(job, 1 / seconds, job.ranks / seconds)


@dataclass(frozen=True)
class Options:
    """Every size of job that fits, by role, and why the others do not."""

    prefill: list[Option]
    decode: list[Option]
    unified: list[Option]  # of one host; of several only if prefill and decode do not fit apart
    illegal: dict[int, str]  # ranks -> the engine's rule that they break
    too_small: dict[int, str]  # ranks on which a decode job does not fit -> the sum

    @property
    def jobs(self) -> list[Option]:
        return [*self.prefill, *self.decode, *self.unified]


def options(
    config: ModelConfig,
    gpu: Gpu,
    gpus: int,
    traffic: Traffic,
    per_host: int,
    redundant: int | None,
    speculate: int = 0,
) -> Options:
    """Try every size of job. `redundant` None: as few redundant experts as divide. `speculate`: drafts per step."""
    found = Options([], [], [], {}, {})
    for ranks in job_sizes(config, gpus, per_host):
        extra = least_redundant(config, ranks) if redundant is None else redundant
        try:
            check_job(config, ranks, 1, extra)
        except ValueError as error:
            found.illegal[ranks] = str(error)
            continue
        for role, fitting in (("prefill", found.prefill), ("decode", found.decode), ("unified", found.unified)):
            if role == "unified" and ranks > per_host and apart(found, gpus) is not None:
                continue
            job = best_split(config, gpu, role, ranks, extra, traffic, per_host, speculate)
            if job is not None:
                fitting.append(option(config, gpu, job, traffic))
            elif role == "decode":
                found.too_small[ranks] = _excess(config, gpu, ranks, extra, traffic, per_host, speculate)
    return found


def _excess(
    config: ModelConfig, gpu: Gpu, ranks: int, redundant: int, traffic: Traffic, per_host: int, speculate: int
) -> str:
    """Return the sum that is over the limit, with as much attention TP as is legal."""
    attn_tp = max(splits(config, ranks, redundant, per_host))
    for role in ("unified", "decode"):  # a unified job needs a little less
        least = smallest(config, role, ranks, attn_tp, redundant, traffic, per_host, speculate)
        if not fits(config, gpu, least, traffic):
            break
    return refusal(config, gpu, least, traffic)


def unified(found: Options, gpus: int) -> Deployment | None:
    """Return the unified jobs with the most requests per second together, or None if none fits."""
    deployments = [Deployment(None, one, 0, gpus // one.job.ranks) for one in found.unified]
    return max(deployments, key=lambda one: (one.requests, -one.gpus), default=None)


def apart(found: Options, gpus: int) -> Deployment | None:
    """Return the prefill and decode jobs on at most `gpus` GPUs with the most requests per second.

    None: there is no room for one job of each. Between equal ones, the one with fewer GPUs wins.
    """
    deployments = []
    for first in found.prefill:
        for second in found.decode:
            per_prefill, per_decode = first.requests / first.job.ranks, second.requests / second.job.ranks
            ideal = gpus * per_decode / (per_prefill + per_decode) / first.job.ranks  # prefill jobs
            for jobs in {max(1, int(ideal)), int(ideal) + 1}:
                rest = (gpus - jobs * first.job.ranks) // second.job.ranks
                if rest > 0:
                    needed = min(rest, -int(-jobs * first.requests // second.requests))
                    deployments.append(Deployment(first, second, jobs, needed))
    return max(deployments, key=lambda one: (one.requests, -one.gpus), default=None)


def command(job: Job, model: str) -> str:
    """Return the command that starts the job, once per host. NODE is the host's number, from 0."""
    words = ["torchrun"]
    if job.hosts > 1:
        words += ["--nnodes", str(job.hosts), "--node-rank", "NODE", "--master-addr", "FIRST_HOST"]
        words += ["--master-port", "29500"]
    words += ["--nproc-per-node", str(job.ranks // job.hosts), "run.py", "--role", job.role, "--model", model]
    if job.role == "unified":
        words += ["--input", "in.jsonl", "--output", "out.jsonl"]
    else:
        words += ["--router", ROUTER]
    if job.role != "unified" or job.hosts > 1:
        words += ACCESS
    sizes = {
        "--attn-tp": job.attn_tp if job.attn_tp > 1 else None,
        "--redundant-experts": job.redundant or None,
        "--max-model-len": job.max_model_len,
        "--max-batch": job.max_batch,
        "--max-tokens-per-step": job.max_tokens_per_step,
        "--speculate": job.speculate or None,
    }
    words += [word for flag, value in sizes.items() if value is not None for word in (flag, str(value))]
    return shlex.join(words)


def router_command(model: str) -> str:
    words = ["python", "run.py", "--role", "router", "--router", ROUTER, *ACCESS, "--model", model]
    return shlex.join([*words, "--input", "in.jsonl", "--output", "out.jsonl"])


def commands(deployment: Deployment, model: str) -> list[str]:
    """Return the commands of a deployment: the router's if it has one, then one per kind of job."""
    router = [router_command(model)] if deployment.prefill is not None else []
    return router + [command(one.job, model) for one, _ in deployment.sides]
