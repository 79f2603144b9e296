"""The benchmarks of drafts on a GPU: forced acceptance works in a CUDA graph, and draws alike with one and without."""

import argparse

import pytest
import torch

from scripts.bench.lib.forced import ForcedAcceptance
from scripts.bench.one_rank.drafts import DraftingStep
from scripts.bench.one_rank.rank import Rank, captured, check_flags

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


def test_forced_acceptance_draws_anew_in_every_replay() -> None:
    eager, forced = (ForcedAcceptance(0.6, CUDA) for _ in range(2))
    chosen = torch.zeros(64, 4, dtype=torch.int64, device=CUDA)
    counts = torch.empty(64, dtype=torch.int64, device=CUDA)
    graph = captured(lambda: counts.copy_(forced(chosen[:, 1:], chosen)))
    eager.calls.copy_(forced.calls)
    seen = []
    for _ in range(50):
        graph.replay()
        assert torch.equal(counts, eager(chosen[:, 1:], chosen))
        seen.append(counts.clone())
    assert len({tuple(one.tolist()) for one in seen}) == 50
    assert torch.stack(seen).ge(1).float().mean().item() == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("drafts", [1, 2])
def test_a_step_that_drafts_replays(drafts: int) -> None:
    flags = "--ep 4 --redundant 0 --skew 1 --shape v3 --layers 5 --device cuda"
    parser = argparse.ArgumentParser()
    for name, kind in (("ep", int), ("redundant", int), ("skew", float), ("shape", str), ("layers", int)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--device")
    parser.add_argument("--backend", action="append")
    args = parser.parse_args(flags.split())
    config, device = check_flags(args, num_nextn_predict_layers=1, drafts=True, n_routed_experts=32, n_group=4)
    rank = Rank(args, config, device, 1024, 64 * 16)
    step = DraftingStep(rank, 64, 1024, drafts, 0.6)
    prepared = step.prepared()
    before = step.accepted.calls.item()
    tokens = [step.tokens.clone()]
    for _ in range(3):
        prepared.run()
        tokens.append(step.tokens.clone())
    torch.cuda.synchronize()
    assert step.accepted.calls.item() == before + 3
    assert all((t >= 0).all() and (t < config.vocab_size).all() for t in tokens)
    assert not torch.equal(tokens[0], tokens[1])
