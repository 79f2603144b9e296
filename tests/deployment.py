"""A router, a prefill job and a decode job; and one process that answers the same requests."""

import json
from pathlib import Path

from scripts.tools.demo import free_port
from tests.conftest import eventually
from tests.processes import Job, Process

LINES = [
    {"id": "a", "prompt": "In the beginning", "max_tokens": 8},
    {"id": "b", "prompt_token_ids": [5, 6, 7] * 30, "max_tokens": 5, "temperature": 0.9, "seed": 3},
    {"id": "c", "messages": [{"role": "user", "content": "river"}], "max_tokens": 1, "logprobs": 3},
    {"id": "d", "prompt": "def ", "max_tokens": 12, "ignore_eos": True, "stop": [" "]},
    {"id": "e", "prompt_token_ids": [9], "max_tokens": 70, "ignore_eos": True, "return_experts": True},
]


def run(*flags: str, ranks: int = 1, timeout: float = 90) -> tuple[int, str, str]:
    """Run run.py. Return its exit status, stdout and stderr."""
    return Job(list(flags), ranks).finish(timeout)


def write_lines(path: Path) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers_alone(model: Path, source: Path, out: Path) -> list[dict]:
    """Answer the requests with one unified process, and return the answers."""
    code, _, err = run("--model", str(model), "--input", str(source), "--output", str(out))
    assert code == 0, err
    return read(out)


def timeless(answers: list[dict]) -> list[dict]:
    """Leave out what depends on when and where requests run."""
    out = ("ttft_s", "latency_s", "cached_tokens", "accepted_tokens", "verified_tokens", "logprobs")
    return [{k: v for k, v in answer.items() if k not in out} for answer in answers]


class Deployment:
    """The three jobs of a deployment, each of which a test can start and kill."""

    def __init__(self, model: Path, source: Path, out: Path) -> None:
        self.model, self.router_model, self.source, self.out = str(model), str(model), str(source), out
        self.address, self.jobs = f"127.0.0.1:{free_port()}", {}

    def job_flags(self, role: str, *more: str) -> list[str]:
        return ["--role", role, "--router", self.address, "--model", self.model, *more]

    def start_job(self, role: str, ranks: int = 2, *more: str, env: dict[str, str] | None = None) -> None:
        self.jobs[role] = Job(self.job_flags(role, *more), ranks, env=env)

    def start_router(self) -> None:
        flags = ["--role", "router", "--router", self.address, "--model", self.router_model]
        self.jobs["router"] = Process([*flags, "--input", self.source, "--output", str(self.out)])

    def kill(self, role: str) -> None:
        self.jobs.pop(role).end()

    def finish(self, timeout: float = 90) -> dict[str, tuple[int, str, str]]:
        return {role: job.finish(timeout) for role, job in self.jobs.items()}

    def wait_for_answers(self, count: int, timeout: float = 60) -> None:
        def answered() -> bool:
            return self.out.exists() and len(self.out.read_text().splitlines()) >= count

        assert eventually(answered, timeout), f"no {count} answers in {timeout} s"
