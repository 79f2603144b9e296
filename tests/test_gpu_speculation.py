"""Speculation on a GPU: the tokens of a job without, where rounding leaves no choice."""

from pathlib import Path

import pytest
import torch

from disagg.engine import Engine
from disagg.request import Request
from kernels.backend import choose
from model.config import ModelConfig
from model.transformer import op_shape
from parallel.mesh import Mesh
from tests.test_speculation import all_kinds, make_engine, prompts_of, same, serve

pytestmark = pytest.mark.gpu
MESH = Mesh(device=torch.device("cuda"))


def engine_of(folder: Path, drafts: int, dtype: torch.dtype) -> Engine:
    ops, _ = choose(op_shape(ModelConfig.from_pretrained(folder)), dtype, MESH.device)
    name = str(dtype).removeprefix("torch.")
    engine = make_engine(folder, drafts, MESH, ops, dtype=name, graphs="off")
    engine.warm_up(list)
    return engine


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_every_kind_of_request_gets_the_same_answer_in_float32(tiny: Path, drafts: int) -> None:
    """Steps run ahead of the host here, but for those of requests that change their logits."""
    requests = all_kinds(tiny)
    plain, drafting = (engine_of(tiny, n, torch.float32) for n in (0, drafts))
    same(serve(drafting, requests)[0], serve(plain, requests)[0])
    for engine in (plain, drafting):
        engine.close()


@pytest.mark.parametrize("drafts", [1, 3])
def test_in_bf16_tokens_part_only_where_two_are_as_likely(tiny: Path, drafts: int) -> None:
    """One row and N + 1 rows are rounded differently. Where a text parts, that decides between the two tokens.

    So their log probabilities differ by at most twice what rounding changes elsewhere, before any text parts.
    """
    work = [Request(i, p, 48, ignore_eos=True, logprobs=8) for i, p in enumerate(prompts_of(tiny))]
    plain, drafting = (engine_of(tiny, n, torch.bfloat16) for n in (0, drafts))
    want, (got, stats) = serve(plain, work)[0], serve(drafting, work)
    rounding, gaps = 0.0, []
    for uid, answer in want.items():
        other = got[uid]
        for at, (one, two) in enumerate(zip(answer.tokens, other.tokens, strict=True)):
            mine, theirs = dict(answer.logprobs[at]), dict(other.logprobs[at])
            rounding = max(rounding, *(abs(mine[t] - theirs[t]) for t in mine.keys() & theirs.keys()))
            if one != two:
                assert two in mine, f"request {uid}, token {at}"
                gaps.append(mine[one] - mine[two])
                break
    rate = stats["decode_step_tokens"] / stats["decode_steps"]
    print(
        f"{len(gaps)} of {len(work)} texts part, at gaps of {gaps}; rounding {rounding:.3f}; {rate:.2f} tokens a step"
    )
    assert rounding < 0.5 and all(gap <= 2 * rounding for gap in gaps)
    assert len(gaps) <= len(work) // 2
    for engine in (plain, drafting):
        engine.close()
