"""Commands as a user types them: torchrun with its ranks, and processes with their own imports."""

import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest

from scripts.tools import demo
from tests.commands import (
    LIMIT_S,
    children,
    descendants,
    finish,
    finish_torchrun,
    listed,
    processes,
    run,
    start,
    torchrun,
)
from tests.conftest import eventually
from tests.deployment import LINES, Deployment, answers_alone, read, timeless


def test_what_takes_too_long_is_ended_alone() -> None:
    """With its children, in whatever session, and nothing else that looks like it."""
    sleep = "import time; time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}, 'x'], start_new_session=True)"
    other = start(sys.executable, "-c", sleep, "x")
    process = start(sys.executable, "-c", parent, "x")
    assert eventually(lambda: descendants(process.pid))
    ended = descendants(process.pid)
    with pytest.raises(AssertionError, match="still running after 0.1 s"):
        finish(process, timeout=0.1)
    assert process.returncode == -signal.SIGKILL and not [pid for pid in ended if pid in processes(sleep)]
    assert other.poll() is None
    other.kill()
    other.communicate()


def test_prompt_prints_its_continuation(tiny: Path) -> None:
    flags = ("--model", str(tiny), "--prompt", "In the beginning", "--max-tokens", "12")
    code, out, err = run(*flags)
    assert code == 0 and len(out.strip()) > 10
    assert "1 length" in err and "TTFT" in err and "Traceback" not in err


def test_ctrl_c_while_it_starts_ends_it_at_once(tiny: Path) -> None:
    """As soon as it takes signals, which is long before it has imported torch."""

    def takes_signals() -> bool:
        (caught,) = [line.split()[1] for line in listed("pid=,caught=") if int(line.split()[0]) == process.pid]
        return bool(int(caught.strip("<>"), 16) >> (signal.SIGTERM - 1) & 1)

    process = start(sys.executable, "run.py", "--model", str(tiny), "--prompt", "In", "--max-tokens", "2000")
    assert eventually(takes_signals)
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process) == (0, "", "run.py: interrupted\n")


def test_too_few_open_files_are_one_clear_line(tiny: Path) -> None:
    """With some two dozen, a library would end the process with a core dump, or it would hang."""
    command = f"ulimit -n 24; exec {shlex.join([sys.executable, 'run.py', '--model', str(tiny), '--prompt', 'In'])}"
    said = "run.py: error: open files: the system allows 24 (ulimit -Hn), at least 256 are needed\n"
    assert finish(start("bash", "-c", command)) == (2, "", said)


def test_torchrun_gives_the_same_answers_until_an_interrupted_rank_ends_its_whole_job(
    small: Path, tmp_path: Path
) -> None:
    """SIGINT to one rank only, not to torchrun (which reports a signal that it gets itself, whatever its ranks do)."""
    prompts, source, out = tmp_path / "prompts.jsonl", tmp_path / "long.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps(line | {"max_tokens": min(line["max_tokens"], 8)}) + "\n" for line in LINES))
    source.write_text(prompts.read_text() + '{"prompt": "In", "max_tokens": 2000, "ignore_eos": true}\n')
    process = torchrun(2, "--model", str(small), "--input", str(source), "--output", str(out))
    assert eventually(lambda: out.exists() and len(read(out)) == len(LINES), LIMIT_S)  # the short ones are answered
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGINT)
    code, _, err = finish_torchrun(process)
    assert code == 0 and "Traceback" not in err, err
    assert "ranks: 2, attention replicas: 2" in err
    *answers, interrupted = read(out)
    assert interrupted["finish_reason"] == "error"
    assert timeless(answers) == timeless(answers_alone(small, prompts, tmp_path / "alone.jsonl"))


def test_a_prefill_job_that_loses_one_of_its_ranks_costs_no_request(small: Path, tmp_path: Path) -> None:
    """Its other replica outlives that for a moment, in which no retry may go there."""
    source = tmp_path / "long.jsonl"
    rows = [{"prompt_token_ids": [7 + i] * 700, "max_tokens": 2, "ignore_eos": True} for i in range(12)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    deployment = Deployment(small, source, tmp_path / "out.jsonl")
    flags = deployment.job_flags("prefill", "--max-tokens-per-step", "64")
    killed = torchrun(2, *flags)
    deployment.start_job("decode", 1)
    deployment.start_router()
    deployment.wait_for_answers(1, LIMIT_S)
    ranks = processes(deployment.address, "--role prefill")
    assert len(ranks) == 2
    os.kill(ranks[-1], signal.SIGKILL)
    assert len(read(deployment.out)) < 11, "it was nearly over before the rank died: the test shows nothing"
    deployment.start_job("prefill", ranks=1)
    ended = deployment.finish()
    finish_torchrun(killed)
    assert not processes(deployment.address), "it left ranks behind"
    for role, (code, _, err) in ended.items():
        assert code == 0, f"{role}: {err}"
    assert [answer["finish_reason"] for answer in read(deployment.out)] == ["length"] * 12
    assert "retries" in ended["router"][2] and "a prefill replica is lost" in ended["router"][2]


def test_a_reader_who_leaves_early_is_no_traceback(tiny: Path) -> None:
    process = start(sys.executable, "run.py", "--model", str(tiny), "--prompt", "In", "--max-tokens", "1000")
    assert process.stdout.read(1)
    process.stdout.close()
    process.stdout = None
    code, _, err = finish(process)
    assert code == 1 and "run.py: error: nobody reads what it prints" in err and "Traceback" not in err, err


def test_the_demo_ends_with_equal_tokens(tmp_path: Path) -> None:
    """As a user types it, with the first, a sampled and a chat prompt of its own file, and fewer tokens."""
    prompts, lines = tmp_path / "prompts.jsonl", Path(demo.ROOT, demo.PROMPTS).read_text().splitlines()
    rows = [json.loads(line) | {"max_tokens": 16} for line in lines]
    prompts.write_text("".join(json.dumps(rows[i]) + "\n" for i in (0, 3, 5, 9)))
    code, out, err = finish(start(sys.executable, "-m", "scripts.tools.demo", str(prompts)))
    assert code == 0, err
    assert "ranks equal those of one process." in out.splitlines()[-1]
    assert "--- genesis: " in out and "KV transfer" in err


def test_the_demo_ends_with_its_router(capfd: pytest.CaptureFixture[str]) -> None:
    """Otherwise its jobs would wait for another router. None is left, and no rank."""
    assert demo.main("scripts/none.jsonl") == 1
    told = capfd.readouterr()
    assert "scripts/none.jsonl" in told.err and "failed:" in told.out
    address = re.search(r"--router (\S+)", told.out)[1]
    assert eventually(lambda: not [line for line in listed("args") if address in line])
