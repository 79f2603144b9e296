"""Prefill and decode jobs that draft: the answers are those without drafts."""

from dataclasses import replace
from pathlib import Path

from disagg.engine import Engine
from disagg.front.parse import UserRequest
from disagg.handoff.endpoints import Handoff
from disagg.interrupt import Interrupt
from disagg.request import Request
from kernels.ops import Ops
from model.config import ModelConfig
from model.pages import PAGE
from parallel.mesh import Mesh
from tests.deployment import Deployment, read, run, timeless, write_lines
from tests.test_speculation import prompts_of
from tests.test_worlds import SETTINGS, answers_to, one_run
from tests.worlds import run_world, sub_mesh


def body(rank: int, folder: Path) -> None:
    config, interrupt = ModelConfig.from_pretrained(folder), Interrupt()
    texts = prompts_of(folder)

    def engine(mesh: Mesh | None, drafts: int, cache: str = "off") -> Engine | None:
        if mesh is None:
            return None
        settings = replace(SETTINGS, speculate=drafts, prefix_cache=cache)
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
    for here, there, drafts in (
        (sub_mesh(0, 1), sub_mesh(2, 1), 3),
        (sub_mesh(0, 2), sub_mesh(2, 2, 2), 1),
        (sub_mesh(0, 2, 2), sub_mesh(2, 2), 3),
    ):
        jobs = [("prefill", engine(here, drafts), here), ("decode", engine(there, drafts), there)]
        got = one_run(jobs, folder, interrupt)
        assert got == kinds or rank, f"{here}, {there}, {drafts} drafts: {got} instead of {kinds}"
        got = one_run(jobs, folder, interrupt, talks, Handoff(checksums=True))
        assert got == told or rank, f"{here}, {there}, {drafts} drafts: {got} instead of {told}"
    here, there = sub_mesh(0, 1), sub_mesh(2, 1)
    for left, right in (("auto", "auto"), ("auto", "off"), ("off", "auto")):
        jobs = [("prefill", engine(here, 2, left), here), ("decode", engine(there, 2, right), there)]
        for again in range(2):
            found = answers_to(talks(0), jobs, folder, interrupt, handoff=Handoff(checksums=True))
            got = [(found[i].token_ids, found[i].finish_reason, found[i].error) for i in sorted(found)]
            assert got == told or rank, f"prefix cache: prefill {left}, decode {right}, {again=}"
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
    deployment.start_job("decode", 1, "--speculate", "2")
    ended = deployment.finish()
    assert {role: code for role, (code, *_) in ended.items()} == {"prefill": 0, "decode": 0, "router": 0}, ended
    assert "    drafts: 2 per step, without overlap\n" in ended["prefill"][2]
    code, _, err = run("--model", str(tiny), "--input", str(source), "--output", str(tmp_path / "alone.jsonl"))
    assert code == 0 and timeless(read(deployment.out)) == timeless(read(tmp_path / "alone.jsonl")), err
