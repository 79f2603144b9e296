"""Prefill and decode jobs that draft: the answers of jobs without drafts, and drafts as good as those of one job."""

import re
from dataclasses import replace
from pathlib import Path

from msgspec import to_builtins

from disagg import pipeline
from disagg.engine import Engine
from disagg.front.answer import Answer
from disagg.front.http.completions import usage
from disagg.front.parse import UserRequest
from disagg.handoff.endpoints import Handoff
from disagg.interrupt import Interrupt
from disagg.request import Request
from kernels.ops import Ops
from model.config import ModelConfig
from model.pages import PAGE
from parallel.mesh import Mesh
from tests.deployment import Deployment, read, run, timeless, write_lines
from tests.test_speculation import RandomDrafts, prompts_of
from tests.test_worlds import SETTINGS, answers_to, collect, one_run
from tests.worlds import run_world, sub_mesh


def body(rank: int, folder: Path) -> None:
    config, interrupt = ModelConfig.from_pretrained(folder), Interrupt()
    texts = prompts_of(folder)

    def engine(mesh: Mesh | None, drafts: int, cache: str = "off", adapts: bool = False) -> Engine | None:
        if mesh is None:
            return None
        settings = replace(SETTINGS, speculate=drafts, prefix_cache=cache, adapts=adapts)
        return Engine.from_pretrained(settings, config, folder, mesh, Ops())

    def talks(_: int) -> list[UserRequest]:
        """Texts that the model continues with drafts that are right, greedily and not. Two pages begin them all."""
        shared = [(texts[1] * 9)[:PAGE], (texts[2] * 9)[:PAGE]]
        asked = [shared[i % 2] + texts[8 + i] for i in range(4)] + [shared[0] + texts[3] * 3]
        return [
            UserRequest(i, Request(0, prompt, 14, temperature=0.5 * (i % 2), seed=i, ignore_eos=True), [])
            for i, prompt in enumerate(asked)
        ]

    one = sub_mesh(0, 1)
    plain = engine(one, 0)
    kinds = one_run([("unified", plain, one)], folder, interrupt)
    told = one_run([("unified", plain, one)], folder, interrupt, talks)
    accepted = {}  # by drafts: the tokens of each answer beyond one per step, in one job
    for drafts in (1, 2, 3):
        found = answers_to(talks(0), [("unified", engine(one, drafts), one)], folder, interrupt)
        accepted[drafts] = [found[i].accepted_tokens for i in sorted(found)]
    assert rank or sum(accepted[1]) > 10 and sum(accepted[3]) > sum(accepted[1])
    for here, there, drafts in (
        (sub_mesh(0, 1), sub_mesh(2, 1), 3),
        (sub_mesh(0, 2), sub_mesh(2, 2, 2), 1),
        (sub_mesh(0, 2, 2), sub_mesh(2, 2), 3),
    ):
        jobs = [("prefill", engine(here, drafts), here), ("decode", engine(there, drafts), there)]
        got = one_run(jobs, folder, interrupt)
        assert got == kinds or rank, f"{here}, {there}, {drafts} drafts: {got} instead of {kinds}"
        found = answers_to(talks(0), jobs, folder, interrupt, handoff=Handoff(checksums=True))
        assert collect(found) == told or rank, f"{here}, {there}, {drafts} drafts: {found} instead of {told}"
        got = [found[i].accepted_tokens for i in sorted(found)]
        assert got == accepted[drafts] or rank, f"{here}, {there}, {drafts} drafts, accepted: {got} not {accepted}"
    here, there = sub_mesh(0, 1), sub_mesh(2, 2, 2)
    pipeline.DraftPolicy = RandomDrafts  # each rank is a process of its own
    jobs = [("prefill", engine(here, 3), here), ("decode", engine(there, 3, adapts=True), there)]
    got = one_run(jobs, folder, interrupt), one_run(jobs, folder, interrupt, talks)
    assert got == (kinds, told) or rank, f"0 to 3 drafts: {got} instead of {kinds} and {told}"
    here, there = sub_mesh(0, 1), sub_mesh(2, 1)
    for left, right in (("auto", "auto"), ("auto", "off"), ("off", "auto")):
        jobs = [("prefill", engine(here, 2, left), here), ("decode", engine(there, 2, right), there)]
        for again in range(2):
            found = answers_to(talks(0), jobs, folder, interrupt, handoff=Handoff(checksums=True))
            assert collect(found) == told or rank, f"prefix cache: prefill {left}, decode {right}, {again=}"
            got = [found[i].accepted_tokens for i in sorted(found)]
            assert got == accepted[2] or rank, f"prefix cache: {left}, {right}, {again=}: {got} not {accepted[2]}"
            hits = sum(answer.cached_tokens for answer in found.values())
            assert rank or hits >= (left == "auto") * (3 + 2 * again) * PAGE, (left, right, hits)
        caches = [(job.scheduler.cache.hits, how) for (_, job, _), how in zip(jobs, (left, right), strict=True) if job]
        assert all((hits > 3) == (how == "auto") for hits, how in caches), caches


def test_prefill_and_decode_that_draft_give_the_same_answers(tiny: Path) -> None:
    run_world(4, body, tiny, timeout_s=200)


def test_jobs_with_other_drafts_are_refused_and_those_alike_serve(tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl")
    deployment = Deployment(tiny, source, tmp_path / "out.jsonl")
    deployment.start_job("prefill", 1, "--speculate", "2")
    deployment.start_router()
    deployment.jobs["router"].until("a prefill replica joined")
    deployment.start_job("decode", ranks=1)
    code, _, err = deployment.jobs.pop("decode").finish()
    said = "decode: refused: its KV is not the others': --speculate is 0, the others have 2\n"
    assert code != 0 and said in err, err
    deployment.start_job("decode", 1, "--speculate", "auto:2")
    ended = deployment.finish()
    assert {role: code for role, (code, *_) in ended.items()} == {"prefill": 0, "decode": 0, "router": 0}, ended
    assert "    drafts: 2 per step\n" in ended["prefill"][2] and "    drafts: 0 to 2 per step\n" in ended["decode"][2]
    code, _, err = run("--model", str(tiny), "--input", str(source), "--output", str(tmp_path / "alone.jsonl"))
    answers, alone = read(deployment.out), read(tmp_path / "alone.jsonl")
    assert code == 0 and timeless(answers) == timeless(alone), err
    accepted = [answer["accepted_tokens"] for answer in answers]
    steps = sum(answer["completion_tokens"] - 1 for answer in answers) - sum(accepted)
    said = r"\n +drafts  decode: (\S+) tokens per request and step, of (\S+) drafts; right by place: \S+, \S+\n"
    match = re.search(said, ended["router"][2])
    assert match, ended["router"][2]
    tokens, drafts = float(match[1]), float(match[2])
    # Of the steps that verified drafts, while `steps` are all. A stop string cuts a step's tokens.
    assert 1 + sum(accepted) / steps - 0.1 <= tokens <= 1 + drafts
    assert (tokens > 1) == (sum(accepted) > 0)
    assert 0 < drafts < 2, "the policy tries other numbers"
    assert "drafts" not in err and not any("accepted_tokens" in answer for answer in alone)


def test_the_usage_of_openais_api_has_the_drafts_that_were_right() -> None:
    answers = [
        Answer(i, "", [5] * 9, "length", 4, 9, 0.1, 0.2, accepted_tokens=n, verified_tokens=n + 3)
        for i, n in enumerate((0, 6))
    ]
    assert to_builtins(usage(answers))["completion_tokens_details"] == {
        "accepted_prediction_tokens": 6,
        "rejected_prediction_tokens": 6,
    }
    assert "completion_tokens_details" not in to_builtins(usage([replace(answers[0], accepted_tokens=None)]))
