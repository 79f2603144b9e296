"""What replicas report while they serve is what they have done; no rank waits for another one to report."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from disagg import reports
from disagg.config import EngineConfig, Rebalance
from disagg.control.ports import RouterPort
from disagg.engine import Engine
from disagg.front.http.metrics import render
from disagg.front.parse import UserRequest
from disagg.front.progress import Progress
from disagg.front.router import Router
from disagg.interrupt import Interrupt
from disagg.loop import serve
from disagg.request import Request
from kernels.ops import Ops
from model.config import ModelConfig
from model.footprint import page_bytes
from model.pages import pages_for
from tests.exposition import Keeper, value
from tests.worlds import run_world, sub_mesh

PROMPTS, GENERATED = (1, 63, 64, 65, 130), 12  # tokens of each request
SETTINGS = EngineConfig(max_batch=4, max_tokens_per_step=96, kv_tokens=1024, max_model_len=512, overlap="off")


def ask(router: Router) -> bytes:
    """Serve the requests. Return the metrics once all of it has been reported, while the jobs still serve."""
    for i, length in enumerate(PROMPTS):
        router.submit(UserRequest(i, Request(0, [5 + i] * length, GENERATED, ignore_eos=True), []), Keeper())
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        router.turn(None, 10)
        stats = [replica.stats for replica in router.fleet.replicas.values()]
        tokens = [sum(s.get(name, 0) for s in stats) for name in ("prompt_tokens", "decode_step_tokens")]
        idle = all(r.load is not None and not r.load.kv_pages for r in router.fleet.replicas.values())
        # Every request's first token is prefill's.
        if tokens == [sum(PROMPTS), len(PROMPTS) * (GENERATED - 1)] and idle and not router.tracked:
            return render(router)
    raise AssertionError(f"not reported: {stats}")


def body(rank: int, folder: Path) -> None:
    reports.REPORT_S = 0.1
    config, interrupt, found = ModelConfig.from_pretrained(folder), Interrupt(), []
    prefill, decode = sub_mesh(0, 1), sub_mesh(1, 2, 2)
    port = [RouterPort("127.0.0.1", 0) if rank == 0 else None]
    where = [port[0].port if port[0] else None]
    dist.broadcast_object_list(where)

    def run() -> None:
        router = Router(port[0], None, config.vocab_size, lambda: False)
        try:
            found.append(ask(router))
            found.append(Progress(1).lines(list(router.fleet.replicas.values()), router.tracked, 5))
        finally:
            router.close()
            found.append(router.metrics.table())

    thread = threading.Thread(target=run)
    if rank == 0:
        thread.start()
    for role, mesh, every in (("prefill", prefill, 0), ("decode", decode, 4)):
        if mesh is not None:
            settings = replace(SETTINGS, rebalance=Rebalance(every), decodes=role == "decode")
            engine = Engine.from_pretrained(settings, config, folder, mesh, Ops())
            assert serve(role, engine, mesh, ("127.0.0.1", where[0]), interrupt) is None
            engine.close()
    if rank == 0:
        thread.join()
        port[0].close()
        check(*found, config)


def check(text: bytes, lines: list[str], table: str, config: ModelConfig) -> None:
    prefill, decode = {"role": "prefill", "rank": "0"}, {"role": "decode", "rank": "0"}
    assert value(text, "moesaic_step_tokens_total", **prefill) == sum(PROMPTS) == 323
    assert value(text, "moesaic_step_tokens_total", **decode) == len(PROMPTS) * (GENERATED - 1)
    assert 4 <= value(text, "moesaic_steps_total", **prefill) <= 9, "323 tokens in steps of 96 at most"
    assert 0 < value(text, "moesaic_step_seconds_total", **decode) < 60
    # Each of the two decode ranks gets a copy, and the first one reports for both.
    pages = sum(map(pages_for, PROMPTS))
    assert value(text, "moesaic_transfer_bytes_total", **decode) == 2 * pages * page_bytes(config, 4)
    assert 2 <= value(text, "moesaic_transfers_total", **decode) <= 2 * pages
    assert value(text, "moesaic_transfers_in_flight", **decode) == 0
    assert value(text, "moesaic_transfer_failures_total", **decode) == 0
    assert value(text, "moesaic_job_info", role="decode", overlap="off", overlap_rule="off", graphs="none") == 1
    assert value(text, "moesaic_expert_looks_total", role="decode") >= 2, "a look every 4 steps"
    assert 0 <= value(text, "moesaic_expert_look_age_seconds", role="decode") < 60
    assert 0 < value(text, "moesaic_balancedness", role="decode") <= 1
    assert lines[0] == "0 waiting, 0 queued, 0 in prefill, 0 in decode; 5 ended"
    assert lines[1].startswith("decode job of 1 replica: 0 running, 0 waiting, KV 0 %, balancedness ")
    assert lines[2] == "prefill job of 1 replica: 0 running, 0 waiting, KV 0 %"
    assert f"KV transfer  {2 * pages * page_bytes(config, 4):,} bytes" in table, "the summary is unchanged"


def test_replicas_report_what_they_have_done(small: Path) -> None:
    run_world(3, body, small)
