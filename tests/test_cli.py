"""run.py as a user meets it: its output, its exit status, its errors of one line.

`test_torchrun.py` has the tests that need torchrun, or processes outside the fork server.
"""

import errno
import json
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from disagg.front.fleet import FAREWELL_S
from disagg.launch import choose_threads
from parallel.load_counter import save_recording
from run import parse_args
from scripts.tools.demo import free_port
from tests.commands import children
from tests.conftest import eventually, has_ipv6
from tests.deployment import Deployment, answers_alone, read, run, timeless, write_lines
from tests.processes import Job, Process


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "prompts.jsonl")


@pytest.fixture(scope="module")
def unified(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The answers of one process."""
    folder = tmp_path_factory.mktemp("unified")
    return answers_alone(tiny, write_lines(folder / "prompts.jsonl"), folder / "out.jsonl")


def test_answers_have_their_fields(unified: list[dict]) -> None:
    assert [answer["id"] for answer in unified] == ["a", "b", "c", "d", "e"]
    assert [len(answer["token_ids"]) for answer in unified if answer["id"] in "ace"] == [8, 1, 70]
    assert unified[3]["finish_reason"] == "stop" and " " not in unified[3]["text"]
    assert unified[1]["prompt_tokens"] == 90 and unified[1]["completion_tokens"] == len(unified[1]["token_ids"])
    pairs = unified[2]["logprobs"][0]
    assert pairs == sorted(pairs, key=lambda pair: -pair[1]) and len(pairs) == 3
    assert unified[2]["token_ids"][0] in [token for token, _ in pairs]
    assert all(0 <= answer["ttft_s"] <= answer["latency_s"] for answer in unified)
    assert all("error" not in answer for answer in unified)
    assert ["experts" in answer for answer in unified] == [False, False, False, False, True]
    assert (
        unified[4]["experts"]["shape"] == [70, 4, 4]
        and len(unified[4]["experts"]["data"]) == -(-70 * 4 * 4 * 2 // 3) * 4
    )


@pytest.mark.parametrize("order", [("decode", "prefill", "router"), ("router", "prefill", "decode")])
def test_jobs_in_any_order(
    tiny: Path, prompts: Path, unified: list[dict], tmp_path: Path, order: tuple[str, ...]
) -> None:
    deployment = Deployment(tiny, prompts, tmp_path / "out.jsonl")
    deployment.router_model = str(tmp_path / "no-weights")  # the router needs none
    shutil.copytree(tiny, deployment.router_model, ignore=shutil.ignore_patterns("*.safetensors"))
    for role in order:
        deployment.start_router() if role == "router" else deployment.start_job(role)
        time.sleep(0.4)
    for role, (code, _, err) in deployment.finish().items():
        assert code == 0 and "Traceback" not in err, f"{role}: {err}"
    assert timeless(read(deployment.out)) == timeless(unified)


def test_ctrl_c_on_the_router_sends_all_home(small: Path, tmp_path: Path) -> None:
    source = tmp_path / "long.jsonl"
    source.write_text("".join(json.dumps({"prompt_token_ids": [i + 9], "max_tokens": n, "ignore_eos": True}) + "\n"
                              for i, n in enumerate([2, 2, 2000, 2000])))  # fmt: skip
    deployment = Deployment(small, source, tmp_path / "out.jsonl")
    deployment.start_job("prefill")
    deployment.start_job("decode")
    deployment.start_router()
    deployment.wait_for_answers(2)
    os.killpg(deployment.jobs["router"].pid, signal.SIGINT)
    for role, (code, _, err) in deployment.finish().items():
        assert code == 0 and "Traceback" not in err, f"{role}: {err}"
    assert [answer["finish_reason"] for answer in read(deployment.out)] == ["length", "length", "error", "error"]
    assert [answer.get("error") for answer in read(deployment.out)][2:] == ["interrupted"] * 2


def test_ctrl_c_on_one_process(small: Path) -> None:
    process = Process(["--model", str(small), "--prompt", "In", "--max-tokens", "2000"])
    assert eventually(lambda: process.out)  # it generates
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = process.finish()
    assert code == 0 and "Traceback" not in err, err


def test_ctrl_c_on_one_rank_ends_a_job_that_serves_http(small: Path) -> None:
    """At once, though its replicas may not have joined the router yet."""
    job = Job(["--model", str(small), "--http", f"127.0.0.1:{free_port()}"], 2)
    job.ranks[0].until("HTTP at")
    job.ranks[1].signal(signal.SIGINT)
    code, _, err = job.finish(FAREWELL_S - 2)
    assert code == 0 and "Traceback" not in err, err


@pytest.mark.parametrize("killed", ["the router", "rank 0"])
def test_a_unified_job_ends_with_its_router_and_the_router_with_the_job(small: Path, killed: str) -> None:
    port = free_port()
    job = Process(["--model", str(small), "--http", f"127.0.0.1:{port}"])
    job.until("HTTP at")
    (router,) = children(job.pid)
    os.kill(router if killed == "the router" else job.pid, signal.SIGKILL)
    if killed == "the router":
        status, _, err = job.finish(20)
        assert status == 1 and "the router's process has ended with status -9" in err
    assert eventually(lambda: not Path(f"/proc/{router}").exists(), 20)
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def test_a_killed_prefill_job_is_replaced(small: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the batch: decode goes on, and what still needs a prefill waits for the next job."""
    source = tmp_path / "many.jsonl"
    rows = [{"prompt_token_ids": [7 + i] * 40, "max_tokens": 24, "ignore_eos": True} for i in range(12)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    deployment = Deployment(small, source, tmp_path / "out.jsonl")
    deployment.start_job("prefill", ranks=1)
    deployment.start_job("decode", 1, "--max-batch", "2")  # few at a time: the router holds the others back
    deployment.start_router()
    deployment.wait_for_answers(2)
    deployment.kill("prefill")
    time.sleep(0.5)
    assert len(read(deployment.out)) < 12, "it was over before the prefill job died: the test shows nothing"
    deployment.start_job("prefill", ranks=1)
    for role, (code, _, err) in deployment.finish().items():
        assert code == 0, f"{role}: {err}"
    assert [answer["finish_reason"] for answer in read(deployment.out)] == ["length"] * 12


@pytest.mark.parametrize("drafts", ["0", "2"])
def test_a_killed_decode_job_takes_no_request_with_it(tiny: Path, tmp_path: Path, drafts: str) -> None:
    """Through the job that takes its place they go on with the tokens that they have, to the end they would have had:
    sampled or not, with their log probabilities. They end as in one job, which does not draft."""
    source = tmp_path / "many.jsonl"
    rows = [
        {"prompt_token_ids": [7 + i], "max_tokens": n, "ignore_eos": True, "seed": i, "temperature": 0.9 * (i % 2)}
        for i, n in enumerate([1, 100, 100, 9])
    ]
    rows[2]["logprobs"] = 2
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    deployment = Deployment(tiny, source, tmp_path / "out.jsonl")
    deployment.start_job("prefill", 1, "--speculate", drafts)
    deployment.start_job("decode", 1, "--max-batch", "1", "--speculate", drafts)  # gets two requests at a time
    deployment.start_router()
    deployment.wait_for_answers(1)
    time.sleep(0.3)
    deployment.kill("decode")
    deployment.start_job("decode", 1, "--speculate", drafts)
    ended = deployment.finish()
    for role, (code, _, err) in ended.items():
        assert code == 0, f"{role}: {err}"
    assert "a decode replica is lost" in ended["router"][2] and "retries" in ended["router"][2]
    answers = read(deployment.out)
    code, _, err = run("--model", str(tiny), "--input", str(source), "--output", str(tmp_path / "alone.jsonl"))
    alone = read(tmp_path / "alone.jsonl")
    assert code == 0 and timeless(answers) == timeless(alone), err
    mine, theirs = (answer[2]["logprobs"] for answer in (answers, alone))
    assert len(mine) == 100
    for one, other in zip(mine, theirs, strict=True):
        assert [token for token, _ in one] == [token for token, _ in other]
        assert [value for _, value in one] == pytest.approx([value for _, value in other], abs=1e-3)


def test_a_replica_with_another_kv_layout_is_refused(small: Path, prompts: Path, tmp_path: Path) -> None:
    deployment = Deployment(small, prompts, tmp_path / "out.jsonl")
    deployment.start_job("prefill", ranks=1)
    deployment.start_router()
    deployment.jobs["router"].until("a prefill replica joined")
    deployment.start_job("decode", 1, "--dtype", "bfloat16")
    code, _, err = deployment.jobs.pop("decode").finish()
    difference = "refused: its KV is not the others': dtype is bfloat16, the others have float32 (--model, --dtype)"
    assert code != 0 and f"decode: {difference}" in err, err
    deployment.start_job("decode", ranks=1)
    ended = deployment.finish()
    assert [code for code, *_ in ended.values()] == [0, 0, 0]
    assert f"a decode replica was {difference}" in ended["router"][2]
    assert all(answer["finish_reason"] != "error" for answer in read(deployment.out))


def test_a_replica_with_other_weights_is_refused(small: Path, prompts: Path, tmp_path: Path) -> None:
    """One that was trained on has other norms; nothing else tells the two apart."""
    other, path = tmp_path / "other", tmp_path / "other" / "model.safetensors"
    shutil.copytree(small, other)
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    deployment = Deployment(small, prompts, tmp_path / "out.jsonl")
    deployment.start_job("prefill", ranks=1)
    deployment.start_router()
    deployment.jobs["router"].until("a prefill replica joined")
    deployment.start_job("decode", 1, "--model", str(other))
    code, _, err = deployment.jobs.pop("decode").finish()
    assert code != 0 and re.search("decode: refused: .*: model is .{8}, the others have .{8} ", err), err
    deployment.start_job("decode", ranks=1)
    assert [code for code, *_ in deployment.finish().values()] == [0, 0, 0]


def test_a_token_that_only_the_routers_model_has_ends_its_own_request(small: Path, tmp_path: Path) -> None:
    source = tmp_path / "two.jsonl"
    source.write_text("".join(f'{{"prompt_token_ids": [{token}], "max_tokens": 2}}\n' for token in (4500, 45)))
    deployment = Deployment(small, source, tmp_path / "out.jsonl")
    deployment.router_model = str(tmp_path / "larger")
    shutil.copytree(small, deployment.router_model, ignore=shutil.ignore_patterns("*.safetensors"))
    config = Path(deployment.router_model, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 5000}))
    deployment.start_job("prefill", ranks=1)
    deployment.start_job("decode", ranks=1)
    deployment.start_router()
    assert [code for code, *_ in deployment.finish().values()] == [0, 0, 0]
    bad, good = read(deployment.out)
    assert bad["error"] == "token 4500 is not in the vocabulary of 4096 of the model that serves it"
    assert good["finish_reason"] == "length"


def test_a_batch_of_nothing_ends_well(tiny: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "bad.jsonl", tmp_path / "out.jsonl"
    source.write_text("bad\n")
    code, _, err = run("--model", str(tiny), "--input", str(source), "--output", str(out), ranks=2)
    assert code == 1 and "1 error" in err and "gone" not in err, err
    assert [answer["finish_reason"] for answer in read(out)] == ["error"]


def test_a_prompt_that_fails_says_so_by_its_status(tiny: Path) -> None:
    code, out, err = run("--model", str(tiny), "--prompt", "x", "--max-tokens", "100", "--kv-tokens", "64")
    assert (code, out.strip()) == (1, "")
    assert "\nrun.py: error: the request can never fit: " in err and "Traceback" not in err


def test_a_batch_in_which_all_failed_says_so_by_its_status(tiny: Path, tmp_path: Path) -> None:
    """One answer that is none makes it a success: tests below."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "x", "max_tokens": 100}\n' * 2 + "bad\n")
    flags = ("--model", str(tiny), "--input", str(source), "--output", str(out))
    code, _, err = run(*flags, "--kv-tokens", "64")
    assert code == 1 and "3 error" in err and "Traceback" not in err, err
    assert [answer["id"] for answer in read(out)] == [1, 2, 3]
    source.write_text("\n \n")
    assert run(*flags, "--existing", "overwrite")[0] == 0  # nothing failed
    assert read(out) == []


def test_a_failed_batch_is_the_routers_status(small: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "x", "max_tokens": 100}\n')
    deployment = Deployment(small, source, tmp_path / "out.jsonl")
    deployment.start_job("prefill", ranks=1)
    deployment.start_job("decode", 1, "--kv-tokens", "64")
    deployment.start_router()
    assert {role: code for role, (code, *_) in deployment.finish().items()} == {"prefill": 0, "decode": 0, "router": 1}


def test_a_run_that_cannot_start_leaves_the_old_output(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("an earlier run's\n")
    flags = ("--model", str(tiny), "--input", str(prompts), "--output", str(out), "--existing", "overwrite")
    code, _, err = run(*flags, "--kv-tokens", "640000000000")
    assert code == 2 and "--kv-tokens 640000000000: a KV pool of " in err, err
    assert out.read_text() == "an earlier run's\n"


def test_jobs_meet_over_ipv6(tiny: Path, prompts: Path, unified: list[dict], tmp_path: Path) -> None:
    if not has_ipv6():
        pytest.skip("this machine has no IPv6")
    deployment = Deployment(tiny, prompts, tmp_path / "out.jsonl")
    deployment.address = f"[::1]:{free_port()}"
    deployment.start_job("prefill", ranks=1)
    deployment.start_job("decode", ranks=1)
    deployment.start_router()
    ended = deployment.finish()
    assert {role: code for role, (code, *_) in ended.items()} == {"prefill": 0, "decode": 0, "router": 0}, ended
    assert f"router: listening on {deployment.address}\n" in ended["router"][2]
    assert timeless(read(deployment.out)) == timeless(unified)


@pytest.mark.parametrize("given, threads", [(None, [1]), ("2", [])])
def test_one_thread_on_a_cpu_unless_the_user_says_otherwise(
    given: str | None, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    choose_threads(torch.device("cuda"))
    assert chosen == []
    choose_threads(torch.device("cpu"))
    assert chosen == threads


def test_a_disk_that_fills_up_ends_the_job(tiny: Path, prompts: Path) -> None:
    code, _, err = run("--model", str(tiny), "--input", str(prompts), "--output", "/dev/full")
    assert code == 2 and "--output /dev/full: cannot be written (No space left on device)" in err
    assert "Traceback" not in err


def test_a_bad_line_ruins_only_itself(tiny: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "mixed.jsonl", tmp_path / "out.jsonl"
    lines = [
        '{"id": 1, "prompt": "In", "max_tokens": 2, "ignore_eos": true}',
        "{not json",
        '{"id": 3, "prompt": "x", "surprise": 1}',
        '{"id": 4, "prompt": ""}',
        '{"id": 5, "prompt_token_ids": [4096]}',
        '{"id": 6, "prompt": "x", "max_tokens": 0}',
        '{"id": 7, "prompt": "x", "top_p": 1.5}',
        '{"id": 8, "prompt": "x", "messages": []}',
        '{"id": 9, "prompt_token_ids": [5], "max_tokens": 2048}',
        '{"id": 10, "prompt_token_ids": ' + json.dumps([5] * 600) + ', "max_tokens": 100}',
        '{"id": 11, "prompt": "In", "max_tokens": 2, "ignore_eos": true}',
    ]
    source.write_text("\n".join(lines) + "\n")
    code, _, err = run("--model", str(tiny), "--input", str(source), "--output", str(out), "--kv-tokens", "640")
    answers = read(out)
    assert code == 0 and "9 error" in err
    assert [answer["id"] for answer in answers] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert [answer["finish_reason"] for answer in answers] == ["length", *["error"] * 9, "length"]
    expected = ["not JSON", "'surprise'", "prompt is ''", "4096", "max_tokens is 0", "top_p is 1.5", "exactly one of",
                "= 2049 is over max_model_len (2048)", "700 tokens need 11 pages of 64, this rank has 10"]  # fmt: skip
    for answer, words in zip(answers[1:10], expected, strict=True):
        assert words in answer["error"], answer


BAD_COMMANDS = {
    "no router": (("--role", "decode"), "the following arguments are required: --router"),
    "no address": (("--role", "router", "--prompt", "x"), "the following arguments are required: --router"),
    "no work": ((), "--role unified needs exactly one of --prompt, --input and --http"),
    "two kinds of work": (("--prompt", "x", "--http", "a:1"), "needs exactly one of --prompt, --input and --http"),
    "limit of HTTP": (("--http", "a:1", "--max-tokens", "8"), "a request of --http has its own max_tokens"),
    "keys without HTTP": (("--prompt", "x", "--api-key-file", "k"), "--api-key-file is for --http"),
    "time limit without HTTP": (("--prompt", "x", "--request-timeout", "5"), "--request-timeout is for --http"),
    "no keys": (("--http", "127.0.0.1:0", "--api-key-file", "no/such"), "--api-key-file no/such: cannot be read"),
    "bad time limit": (
        ("--http", "127.0.0.1:0", "--request-timeout", "x"),
        "--request-timeout is 'x'; it must be S",
    ),
    "HTTP at no host": (("--http", ":8000"), "--http is ':8000'; it must be HOST:PORT"),
    "work for prefill": (("--role", "prefill", "--router", "a:1", "--prompt", "x"), "prefill does not take --prompt"),
    "an address of nobody": (("--prompt", "x", "--router", "a:1"), "--role unified does not take --router"),
    "a router's sizes": (
        ("--role", "router", "--router", "a:1", "--prompt", "x", "--max-batch", "8"),
        "--role router does not take --max-batch",
    ),
    "a worker's limit": (("--role", "decode", "--router", "a:1", "--max-tokens", "8"), "decode does not take --max-to"),
    "limit of lines": (
        ("--input", "{tmp}/in", "--output", "{tmp}/o", "--max-tokens", "8"),
        "--max-tokens 8 is for --prompt; a line of --input has its own max_tokens",
    ),
    "graphs of a router": (
        ("--role", "router", "--router", "a:1", "--graphs", "off"),
        "--role router does not take --graphs",
    ),
    "input alone": (("--input", "x.jsonl"), "--input and --output go together"),
    "output of a prompt": (("--prompt", "x", "--output", "{tmp}/o"), "--input and --output go together"),
    "router at port 0": (("--role", "decode", "--router", "127.0.0.1:0"), "port 0 is only for the router itself"),
    "no such host": (("--role", "router", "--router", "999.1.1.1:1", "--prompt", "x"), "999.1.1.1:1: no such host"),
    "no such router": (("--role", "decode", "--router", "no-such.invalid:1"), "'no-such.invalid:1': no way to reach "),
    "backend": (("--prompt", "x", "--backend", "mla_decode=flash_mla"), "--backend mla_decode=flash_mla: flash_mla: "),
    "backend for all": (("--prompt", "x", "--backend", "triton"), "--backend triton: triton: no GPU"),
    "backend of no op": (("--prompt", "x", "--backend", "=torch"), "--backend =torch: '' is none of rms_norm, "),
    "port": (("--role", "router", "--router", "a:70000", "--prompt", "x"), "its port must be in 0..65535"),
    "kv over memory": (("--prompt", "x", "--kv-tokens", "640000000000"), "--kv-tokens 640000000000: a KV pool of "),
    "missing input": (("--input", "no/such.jsonl", "--output", "{tmp}/o"), "--input no/such.jsonl: cannot be read"),
    "bad address": (("--role", "prefill", "--router", "nowhere"), "--router is 'nowhere'; it must be HOST:PORT"),
    "max batch": (("--prompt", "x", "--max-batch", "0"), "--max-batch is 0; it must be at least 1"),
    "step below batch": (("--prompt", "x", "--max-tokens-per-step", "9"), "--max-batch (64) is over --max-tokens-per"),
    "kv below a page": (("--prompt", "x", "--kv-tokens", "63"), "--kv-tokens is 63; it must be at least a page of 64"),
    "memory": (("--prompt", "x", "--gpu-memory-fraction", "1.5"), "--gpu-memory-fraction is 1.5; it must be in (0, 1]"),
    "redundant": (("--prompt", "x", "--redundant-experts", "-1"), "--redundant-experts is -1; it must be at least 0"),
    "interval": (("--prompt", "x", "--rebalance=-1"), "--rebalance: the interval is -1; it must be at least 0"),
    "threshold": (
        ("--prompt", "x", "--rebalance", "1,2"),
        "--rebalance: the balancedness is 2.0; it must be in (0, 1]",
    ),
    "no interval": (("--prompt", "x", "--rebalance", ",0.9"), "--rebalance is ',0.9'; it must be N, N,B or N,B,L, all"),
    "much to rebalance": (("--prompt", "x", "--rebalance", "1,1,1,1"), "'1,1,1,1'; it must be N, N,B or N,B,L, all of"),
    "empty recording": (("--prompt", "x", "--expert-map", "{tmp}/empty"), "/empty: no tokens were recorded"),
    "layers": (
        ("--prompt", "x", "--rebalance", "1,1,5"),
        "--rebalance: the layers at once are 5; they must be at most the model's layers with experts (4)",
    ),
    "expert map": (("--prompt", "x", "--expert-map", "no/such"), "--expert-map no/such: not a recording"),
    "recording": (("--prompt", "x", "--record-experts", "no/such"), "--record-experts no/such: no such folder"),
    "recording is a folder": (("--prompt", "x", "--record-experts", "{tmp}"), "': it is a folder"),
    "recording without a name": (("--prompt", "x", "--record-experts", ""), "--record-experts '': it is a folder"),
    "many redundant": (
        ("--prompt", "x", "--redundant-experts", "100000000"),
        "--redundant-experts is 100000000; it must be at most one more of every expert on every rank: 32 x 1 = 32",
    ),
    "model len": (("--prompt", "x", "--max-model-len", "4096"), "--max-model-len (4096) is over the model's"),
    "attn tp": (("--prompt", "x", "--attn-tp", "2"), "ranks % --attn-tp must be 0, not 1 % 2 = 1"),
    "empty prompt": (("--prompt", ""), "prompt is ''; it must be a non-empty string"),
    "zero tokens": (("--prompt", "x", "--max-tokens", "0"), "max_tokens is 0; it must be an integer of at least 1"),
    "output is a folder": (("--input", "{tmp}/in", "--output", "{tmp}"), "cannot be written (Is a directory)"),
    "output is the input": (("--input", "{tmp}/in", "--output", "{tmp}/in"), "it is the --input file"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_a_bad_command_is_one_clear_line(tiny: Path, tmp_path: Path, case: str) -> None:
    (tmp_path / "in").write_text('{"prompt": "x"}\n')
    save_recording(tmp_path / "empty", [], 4, 32)
    flags, message = BAD_COMMANDS[case]
    code, out, err = run("--model", str(tiny), *(flag.format(tmp=tmp_path) for flag in flags))
    assert code == 2 and out == "" and err.startswith("run.py: error: ") and err.count("\n") == 1, err
    assert message in err
    assert (tmp_path / "in").read_text() == '{"prompt": "x"}\n'


def test_a_missing_model_is_one_clear_line(tmp_path: Path) -> None:
    code, _, err = run("--model", str(tmp_path / "none"), "--prompt", "x")
    assert (code, err) == (2, f"run.py: error: --model {tmp_path / 'none'}: no such folder\n")


def test_a_port_in_use_is_one_clear_line(tiny: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, _, err = run("--model", str(tiny), "--role", "router", "--router", address, "--prompt", "x")
    assert (code, err) == (2, f"run.py: error: cannot listen on {address}: Address already in use\n")


def test_experts_that_do_not_divide_spell_the_equation(tiny: Path) -> None:
    code, _, err = run("--model", str(tiny), "--prompt", "x", ranks=3)
    assert code != 0
    assert err.count("run.py: error:") == 1 and "n_routed_experts % ranks must be 0, not 32 % 3 = 2" in err


REQUESTS = {"--prompt", "--max-tokens", "--input", "--output", "--existing", "--http"}
REQUESTS |= {"--api-key-file", "--request-timeout", "--log-interval"}
ENGINE = {"--attn-tp", "--dtype", "--backend", "--overlap", "--graphs", "--redundant-experts", "--expert-map"}
ENGINE |= {"--record-experts", "--rebalance", "--max-batch", "--max-tokens-per-step", "--kv-tokens"}
ENGINE |= {"--gpu-memory-fraction", "--load", "--prefix-cache", "--speculate"}
COMMON = {"--model", "--role", "--max-model-len", "--secret-file", "--insecure"}
HANDOFF = {"--transport", "--kv-checksum"}
FLAGS = {
    "unified": COMMON | REQUESTS | ENGINE,
    "router": COMMON | REQUESTS | {"--router"},
    "prefill": COMMON | {"--router"} | HANDOFF | ENGINE,
    "decode": COMMON | {"--router"} | HANDOFF | ENGINE,
}


@pytest.mark.parametrize("role", FLAGS)
def test_the_flags_are_these_and_each_role_shows_its_own(role: str, capsys: pytest.CaptureFixture) -> None:
    """A flag more is a decision: it needs a user who cannot do without."""
    with pytest.raises(SystemExit):
        parse_args(["--role", role, "--help"])
    listed = re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    assert set(listed) == FLAGS[role] and len(listed) == len(set(listed))
    assert len(set().union(*FLAGS.values())) <= 33


def test_help_is_worth_reading() -> None:
    code, out, _ = run("--help")
    assert code == 0 and "torchrun --nproc-per-node 2 run.py --role prefill" in out
