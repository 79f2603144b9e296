"""scripts/top shows what the metrics say, with rates between two looks, and its errors are one line."""

import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from rich.console import Console

from scripts.tools import top
from tests.exposition import rendered


@pytest.fixture(scope="module")
def text() -> str:
    return rendered().decode()


@pytest.fixture
def server(text: str) -> Iterator[str]:
    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = {"/metrics": text, "/other/metrics": "up 1\n"}.get(self.path)
            self.send_response(200 if body else 404)
            self.end_headers()
            self.wfile.write((body or "").encode())

        def log_message(self, *args: object) -> None: ...

    http = HTTPServer(("127.0.0.1", 0), Metrics)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


def drawn(before: top.Scrape | None, now: top.Scrape) -> list[str]:
    console = Console(file=io.StringIO(), width=200)
    console.print(top.view(before, now))
    return console.file.getvalue().splitlines()


def row(lines: list[str], role: str) -> dict[str, str]:
    names = next(line for line in lines if line.startswith("role")).split()
    cells = next(line for line in lines if line.startswith(f"{role} ")).rstrip().replace(" s ", "s ").removesuffix(" s")
    return dict(zip(names, cells.split(), strict=True))


def test_a_look_shows_every_job(text: str) -> None:
    lines = drawn(None, top.parse(text, 0.0))
    assert "1 waiting, 0 queued, 1 prefill, 1 decode; ended: 1 length; 0 retries, 0 migrations" in lines[0]
    assert "TTFT p50 <= " in lines[2] and "inter-token p50 <= " in lines[2] and "request p50 <= " in lines[2]
    prefill, decode = (row(lines, role) for role in ("prefill", "decode"))
    assert decode["job"] == "job-of-d" and decode["replicas"] == decode["run"] == decode["wait"] == "1"
    assert decode["KV"] == decode["fullest"] == "62%" and decode["balance"] == "0.875" and decode["failed"] == "1"
    assert decode["tok/s"] == "-" and prefill["balance"] == prefill["look"] == "-"
    assert [line.split()[0] for line in lines if line.strip()][-2:] == ["prefill", "decode"]


def test_rates_are_those_between_two_looks(text: str) -> None:
    """2 s apart: 20 decode steps with 60 tokens in 0.5 s, 5 of them overlapped, and 1 GB in 0.5 s of transfers."""
    then = changed(text, "moesaic_requests_ended_total", "", 0)
    for name, now in {"steps": 30, "step_tokens": 30, "step_seconds": 1.0, "overlapped_steps": -5}.items():
        then = changed(then, f"moesaic_{name}_total", 'phase="decode"', now)
    then = changed(then, "moesaic_transfer_bytes_total", "", 3e6 - 1e9)
    then = changed(then, "moesaic_transfer_seconds_total", "", -0.25)
    then = changed(then, "moesaic_tokens_total", 'kind="generated"', 1)
    lines = drawn(top.parse(then, 10.0), top.parse(text, 12.0))
    decode = row(lines, "decode")
    found = [decode[name] for name in ("tok/s", "ms/step", "overlap", "GB/s")]
    assert found == ["30", "25.0", "25%", "2.00"]
    assert "tokens/s  0 prompt, 2 generated" in lines[1]
    assert row(drawn(top.parse(text, 1.0), top.parse(then, 2.0)), "decode")["tok/s"] == "-", "a counter began anew"


def test_a_jobs_rates_are_those_between_its_reports(text: str) -> None:
    """The looks are 2 s apart, and the reports 5 s; or there was none in between."""
    then = changed(text, "moesaic_step_tokens_total", 'phase="decode"', 40)
    before = changed(then, "moesaic_report_age_seconds", 'role="decode"', 4.0)
    now = changed(text, "moesaic_report_age_seconds", 'role="decode"', 1.0)
    assert row(drawn(top.parse(before, 10.0), top.parse(now, 12.0)), "decode")["tok/s"] == "10"
    same = changed(text, "moesaic_report_age_seconds", 'role="decode"', 3.0)
    assert row(drawn(top.parse(now, 10.0), top.parse(same, 12.0)), "decode")["tok/s"] == "-"


def changed(text: str, name: str, label: str, value: float) -> str:
    lines = text.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith(f"{name}{{") and label in line]
    lines[at] = f"{lines[at].rpartition(' ')[0]} {value}"
    return "\n".join(lines) + "\n"


def test_quantiles_are_bounds_by_hand() -> None:
    def scrape(*counts: int) -> top.Scrape:
        bounds = ("0.001", "0.002", "+Inf")
        return top.Scrape(0, {"t_bucket": {(("le", bound),): n for bound, n in zip(bounds, counts, strict=True)}})

    assert top.quantile(None, scrape(5, 9, 10), "t", 0.5) == 0.001
    assert top.quantile(None, scrape(5, 9, 10), "t", 0.9) == 0.002
    assert top.quantile(scrape(5, 5, 5), scrape(5, 9, 10), "t", 0.5) == 0.002, "only what came since"
    assert top.quantile(scrape(5, 9, 10), scrape(5, 9, 10), "t", 0.5) is None


def test_the_command_prints_a_look(server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for url, code, said in (
        (server, 0, "job-of-d"),
        (f"{server}/other", 1, "no metrics of a moesaic router are there"),
        (f"{server}/none", 1, "Not Found"),
        ("http://127.0.0.1:1", 1, "Connection refused"),
    ):
        monkeypatch.setattr("sys.argv", ["top", "--once", url])
        assert top.main() == code
        out, err = capsys.readouterr()
        assert said in (out if code == 0 else err)
        assert code == 0 or (err.count("\n") == 1 and err.startswith(f"scripts/top: error: {url}: "))


BAD = {"x:1": "URL is 'x:1'; it must begin", "http://x --every 0": "--every is 0; it must be in 0.1..3600"}


@pytest.mark.parametrize("flags", BAD)
def test_senseless_flags_are_refused(flags: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        top.parse_args(flags.split())
    assert BAD[flags] in capsys.readouterr().err
