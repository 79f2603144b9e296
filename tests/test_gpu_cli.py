"""run.py on a GPU over NCCL gives the tokens of a CPU, unified and with KV handed over between two jobs.

Several ranks share the GPU; NCCL >= 2.30 allows that with NCCL_MULTI_RANK_GPU_ENABLE=1.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.commands import NO_GPU, run
from tests.deployment import Deployment, read

pytestmark = pytest.mark.gpu
PROMPTS = "docs/prompts.jsonl"
TIMEOUT_S = 240  # ranks that share a GPU take turns on it, and the first ones compile


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    out = tmp_path_factory.mktemp("cpu") / "out.jsonl"
    flags = ("--model", "model/tiny", "--input", PROMPTS, "--output", str(out))
    code, _, err = run(*flags, env=NO_GPU)
    assert code == 0, err
    return tokens(out)


def tokens(path: Path) -> list[list[int]]:
    return [answer["token_ids"] for answer in read(path)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("ranks", "attn_tp", "overlap"), [(0, 1, "auto"), (2, 1, "on"), (4, 2, "auto"), (4, 2, "on")])
def test_unified(
    ranks: int, attn_tp: int, overlap: str, backend: str, expected: list[list[int]], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    flags = ("--model", "model/tiny", "--input", PROMPTS, "--output", str(out), "--attn-tp", str(attn_tp))
    flags += ("--overlap", overlap, "--kv-tokens", "65536")
    code, _, err = run(*flags, "--dtype", "float32", "--backend", backend, ranks=ranks,
                       timeout=TIMEOUT_S)  # fmt: skip
    assert code == 0, err
    assert tokens(out) == expected


@pytest.mark.parametrize(
    ("prefill", "decode", "drafts"), [(1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 1, 1), (2, 1, 2), (1, 2, 3)]
)
def test_disaggregated(prefill: int, decode: int, drafts: int, expected: list[list[int]], tmp_path: Path) -> None:
    deployment = Deployment(Path("model/tiny"), Path(PROMPTS), tmp_path / "out.jsonl")
    for role, ranks in (("prefill", prefill), ("decode", decode)):
        # Two jobs on one GPU: left to itself, each would take all that is free.
        flags = ("--dtype", "float32", "--kv-tokens", "65536", "--speculate", str(drafts))
        deployment.start_job(role, ranks, *flags)
    deployment.start_router()
    ended = deployment.finish(TIMEOUT_S)
    for role, (code, _, err) in ended.items():
        assert code == 0, f"{role}: {err}"
    assert tokens(deployment.out) == expected
    accepted = sum(answer.get("accepted_tokens", 0) for answer in read(deployment.out))
    assert (accepted > 0) == (drafts > 0)
    print(json.dumps({"pairing": (prefill, decode), "accepted": accepted, "table": ended["router"][2]}))


@pytest.mark.parametrize("gpus", [1, 2])
def test_decode_reads_the_kv_from_the_memory_of_a_gpu_over_nixl(
    gpus: int, expected: list[list[int]], tmp_path: Path
) -> None:
    """The two jobs share a GPU, or have one each."""
    pytest.importorskip("nixl_cu13")
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    deployment = Deployment(Path("model/tiny"), Path(PROMPTS), tmp_path / "out.jsonl")
    flags = ("--dtype", "float32", "--kv-tokens", "65536", "--transport", "nixl", "--kv-checksum")
    for gpu, role in enumerate(("prefill", "decode")):
        deployment.start_job(role, 1, *flags, env={"CUDA_VISIBLE_DEVICES": str(gpu % gpus)})
    deployment.start_router()
    ended = deployment.finish(TIMEOUT_S)
    for role, (code, _, err) in ended.items():
        assert code == 0, f"{role}: {err}"
    assert tokens(deployment.out) == expected
    assert "over UCX" in ended["decode"][2] and "VRAM" in ended["decode"][2], ended["decode"][2]


@pytest.mark.parametrize("drafts", ["0", "2"])
def test_the_requests_of_a_killed_decode_job_go_on_in_the_next(drafts: str, tmp_path: Path) -> None:
    """In float32 with the tokens that they would have had: prefill computes now what decode had computed before."""
    source, alone = tmp_path / "in.jsonl", tmp_path / "alone.jsonl"
    rows = [{"prompt_token_ids": [7 + i], "max_tokens": n, "ignore_eos": True} for i, n in enumerate([1, 1900, 1900])]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--dtype", "float32", "--kv-tokens", "65536")
    deployment = Deployment(Path("model/tiny"), source, tmp_path / "out.jsonl")
    for role in ("prefill", "decode"):
        deployment.start_job(role, 1, *flags, "--speculate", drafts)
    deployment.start_router()
    deployment.wait_for_answers(1, TIMEOUT_S)
    deployment.kill("decode")
    deployment.start_job("decode", 1, *flags, "--speculate", drafts)
    ended = deployment.finish(TIMEOUT_S)
    assert [code for code, *_ in ended.values()] == [0, 0, 0], ended
    assert "a decode replica is lost" in ended["router"][2] and "retries" in ended["router"][2]
    code, _, err = run("--model", "model/tiny", "--input", str(source), "--output", str(alone), *flags)
    assert code == 0 and tokens(deployment.out) == tokens(alone), err
