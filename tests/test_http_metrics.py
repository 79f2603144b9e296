"""What /metrics says is what has happened, in a form that Prometheus reads; the documents name what there is."""

import json
import math
import re
import time
from collections.abc import Iterator

import pytest

from disagg.control.messages import Hello, Member
from disagg.control.ports import RouterPort
from disagg.front.http.metrics import render
from disagg.front.replica import Replica
from disagg.front.router import Router
from tests.conftest import ROOT
from tests.exposition import DECODE_STATS, OVERLAP_RULE, families, rendered, value

DECODE = {"role": "decode", "job": "job-of-d", "rank": "3"}


@pytest.fixture(scope="module")
def text() -> bytes:
    return rendered()


def test_prometheus_can_read_it(text: bytes) -> None:
    """Each family has its help and type, each series comes once, and histograms are cumulative."""
    found = families(text)
    assert len(found) > 25
    series = set()
    for family in found.values():
        assert family.name.startswith("moesaic_") and family.documentation.endswith(".")
        assert family.type in ("gauge", "counter", "histogram")
        assert not re.search("milli|micro|percent|_ms$|gb$", family.name), "base units only"
        for sample in family.samples:
            assert family.type != "counter" or sample.name == f"{family.name}_total"
            key = sample.name, *sorted(sample.labels.items())
            assert key not in series, f"{key} comes twice"
            series.add(key)
        if family.type == "histogram":
            check_histogram(family.samples)
    assert not any(name.startswith(("python_", "process_")) for name in found), "no series of a global registry"


def check_histogram(samples: list) -> None:
    rest = [{k: v for k, v in s.labels.items() if k != "le"} for s in samples]
    for labels in [one for i, one in enumerate(rest) if one not in rest[:i]]:
        own = [s for s, of in zip(samples, rest, strict=True) if of == labels]
        buckets = [(float(s.labels["le"]), s.value) for s in own if s.name.endswith("_bucket")]
        (count,) = [s.value for s in own if s.name.endswith("_count")]
        assert buckets == sorted(buckets) and [n for _, n in buckets] == sorted(n for _, n in buckets)
        assert buckets[-1] == (math.inf, count) and len(buckets) == 19


def test_requests_are_counted_by_state_and_their_times_measured(text: bytes) -> None:
    states = [value(text, "moesaic_requests", state=state) for state in ("waiting", "queued", "prefill", "decode")]
    assert states == [1, 0, 1, 1]
    assert value(text, "moesaic_tokens_total", kind="prompt") == 15
    assert value(text, "moesaic_tokens_total", kind="generated") == 5
    assert value(text, "moesaic_time_to_first_token_seconds_count") == 2
    assert value(text, "moesaic_inter_token_seconds_count") == 1, "three tokens at once are one observation"
    assert value(text, "moesaic_request_seconds_count") == 1
    assert value(text, "moesaic_requests_ended_total", reason="length") == 1
    for part, seconds in {"queue": 0.5, "prefill": 0.25, "transfer": 0.125, "join": 0.0625}.items():
        assert value(text, "moesaic_first_token_part_seconds_sum", part=part) == seconds
    for le, count in (("0.256", 0), ("0.512", 1)):
        assert value(text, "moesaic_first_token_part_seconds_bucket", part="queue", le=le) == count


def test_replicas_are_shown_as_they_report(text: bytes) -> None:
    assert value(text, "moesaic_replicas", role="prefill") == value(text, "moesaic_replicas", role="decode") == 1
    assert value(text, "moesaic_given_requests", **DECODE) == 2
    assert value(text, "moesaic_kv_pages", **DECODE) == 5 and value(text, "moesaic_kv_pages_capacity", **DECODE) == 8
    cache = {"moesaic_cache_hit_tokens_total": 640, "moesaic_cache_evictions_total": 3, "moesaic_cache_idle_pages": 2}
    assert {name: value(text, name, **DECODE) for name in cache} == cache
    assert value(text, "moesaic_running_requests", **DECODE) == value(text, "moesaic_waiting_requests", **DECODE) == 1
    assert value(text, "moesaic_steps_total", **DECODE) == 50, "a decode replica has no prefill phase"
    assert value(text, "moesaic_steps_total", role="prefill", phase="prefill") == 4
    assert value(text, "moesaic_overlapped_steps_total", role="prefill") == 1
    assert value(text, "moesaic_step_tokens_total", role="prefill") == 400
    assert value(text, "moesaic_step_seconds_total", **DECODE) == 1.5
    transfers = ("transfers", "transfer_bytes", "transfer_seconds", "transfer_failures", "transfer_mismatches")
    for name in (*transfers, "graph_replays", "verifications"):
        assert value(text, f"moesaic_{name}_total", **DECODE) == DECODE_STATS[name]
    for kind, counts in (("verified", [30, 20]), ("accepted", [12, 4])):
        assert [value(text, f"moesaic_{kind}_drafts_total", place=place, **DECODE) for place in "12"] == counts
    assert value(text, "moesaic_transfers_in_flight", **DECODE) == 2
    assert value(text, "moesaic_refusals_total", **DECODE) == 6
    assert value(text, "moesaic_refusals_total", role="router", job="", rank="") == 0
    assert value(text, "moesaic_job_info", role="decode", overlap="auto", overlap_rule=OVERLAP_RULE) == 1
    assert value(text, "moesaic_balancedness", role="decode") == 0.875
    assert value(text, "moesaic_expert_looks_total", role="decode") == 7
    assert 3 <= value(text, "moesaic_expert_look_age_seconds", role="decode") < 30


def test_ages_grow_between_reports_and_series_leave_with_their_replica() -> None:
    port = RouterPort("127.0.0.1", 0)
    router = Router(port, None, 10, lambda: False)
    hello = Hello("decode", [Member("d", "h")], 1, 64, 64, {}, "j")
    replica = Replica("d", hello)
    replica.stats, replica.reported = DECODE_STATS, time.monotonic() - 100
    router.fleet.replicas["d"] = replica
    text = render(router)
    assert (
        140 <= value(text, "moesaic_expert_move_age_seconds") < 170 > value(text, "moesaic_report_age_seconds") >= 100
    )
    del router.fleet.replicas["d"]
    assert not any(family.samples for name, family in families(render(router)).items() if "_age_" in name)
    port.close()


def test_what_a_replica_says_cannot_break_the_text() -> None:
    """Numbers that are none, names that need quoting, and two replicas that claim to be one."""
    port = RouterPort("127.0.0.1", 0)
    router = Router(port, None, 10, lambda: False)
    odd = 'a"\\\n{}='
    hello = Hello("prefill", [Member("a", "h")], 1, 64, 64, {}, odd, about={"overlap": odd, "unknown": odd})
    for name in ("a", "b"):
        router.fleet.replicas[name] = Replica(name, hello)
        router.fleet.replicas[name].stats = {"prefill_steps": math.nan, "transfers": math.inf, "unknown": -1.0}
    text = render(router)
    assert math.isnan(value(text, "moesaic_steps_total", role="prefill", job=odd))
    assert value(text, "moesaic_transfers_total") == math.inf and b"unknown" not in text
    port.close()


def test_the_usage_page_has_every_metric_and_no_other(text: bytes) -> None:
    section = (ROOT / "docs/usage.md").read_text().split("\n## Metrics\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(moesaic_\w+)` \| (\w+) \| ([^|]*) \|", section, re.MULTILINE)
    assert len(rows) == len({name for name, _, _ in rows})
    known = families(text).values()
    wanted = {f.name + "_total" * (f.type == "counter"): f for f in known}
    assert {name: kind for name, kind, _ in rows} == {name: f.type for name, f in wanted.items()}
    for name, _, labels in rows:
        seen = {label for s in wanted[name].samples for label in s.labels} - {"le"}
        assert set(re.findall(r"`(\w+)`", labels)) == seen or not wanted[name].samples, name


def panels(dashboard: dict) -> Iterator[dict]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


def test_the_dashboard_asks_for_metrics_that_there_are(text: bytes) -> None:
    """A panel whose query names a metric that does not exist stays empty, and nobody says why."""
    dashboard = json.loads((ROOT / "docs/grafana.json").read_text())
    names = {sample.name for family in families(text).values() for sample in family.samples}
    names |= {f.name + "_total" for f in families(text).values() if f.type == "counter"}
    labels = {label for f in families(text).values() for s in f.samples for label in s.labels}
    asked, ids = set(), []
    for panel in panels(dashboard):
        ids.append(panel["id"])
        assert panel["title"] and panel["gridPos"]["w"] <= 24
        if panel["type"] == "row":
            continue
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"} and panel["targets"]
        for target in panel["targets"]:
            used = set(re.findall(r"\bmoesaic_\w+", target["expr"]))
            assert used and used <= names, f"{panel['title']}: {used - names}"
            asked |= used
            by = re.findall(r"by \(([^)]*)\)", target["expr"]) + re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
            assert {label.strip() for one in by for label in one.split(",")} <= labels, target["expr"]
            assert target["expr"].count("(") == target["expr"].count(")")
            for counter in re.findall(r"moesaic_\w+_(?:total|bucket|sum|count)", target["expr"]):
                assert re.search(rf"(rate|increase)\({counter}\b[^[]*\[\$__rate_interval\]", target["expr"]), counter
    assert len(ids) == len(set(ids)) and dashboard["uid"] and dashboard["schemaVersion"] >= 39
    assert [v["type"] for v in dashboard["templating"]["list"]] == ["datasource"]
    shown = {re.sub("_(bucket|count|sum)$", "", name) for name in asked}
    families_shown = {f.name for f in families(text).values() if f.name in shown or f"{f.name}_total" in shown}
    missing = {f.name for f in families(text).values()} - families_shown
    assert missing <= {"moesaic_expert_move_seconds", "moesaic_expert_failures", "moesaic_given_requests"}
