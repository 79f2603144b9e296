"""The page at /: what it asks the server for, and in a browser the talk and the picture of a real deployment.

The browser's test needs Playwright and a Chromium (`pip install playwright`, `apt install chromium`), which the project
does not install. Without them it is skipped.
"""

import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagg.control.messages import Hello, Load, Member, Parts, Submit, Update
from disagg.front.http.deployment import MOST_WATCHED, Watched, stage, whereabouts
from disagg.front.replica import Replica
from disagg.front.text_stream import TextStream
from disagg.front.tracked import Tracked
from scripts.tools.demo import free_port
from tests.conftest import eventually
from tests.http_door import Door, first_token, open_door, request_bytes
from tests.processes import Job

NAME = "some-id"


def test_the_page_loads_nothing_from_elsewhere(tiny: Path) -> None:
    with open_door(tiny, first_token) as door:
        status, headers, body = door.get("/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    text = body.decode()
    assert not re.findall(r"https?://|<link|src=|@import|url\(", text)


def test_the_picture_shows_where_a_request_is(tiny: Path) -> None:
    """It is found under the id that its client chose, while it runs and after."""

    def answers(submit: Submit) -> list[Update]:
        return first_token(submit) if submit.request.seed else []

    def picture(door: Door, query: str = f"?request={NAME}") -> dict:
        status, _, body = door.get(f"/deployment{query}")
        assert status == 200
        return json.loads(body)

    with open_door(tiny, answers) as door:
        seen = picture(door)
        assert seen["request"] is None and seen["missing"] == [] and seen["waiting"] == 0
        (replica,) = seen["replicas"]
        assert replica["role"] == "unified" and replica["kv_used"] == 0 and replica["running"] == 0
        sock = door.connect()
        body = {"model": "tiny", "prompt": "In", "max_tokens": 70, "seed": 1, "stream": True}
        sock.sendall(request_bytes("/v1/completions", body, x_request_id=NAME))
        assert sock.recv(1)  # the first token's event begins
        request = picture(door)["request"]
        assert request["state"] == "decode" and request["decode"] == request["prefill"] == replica["id"]
        assert 0 < request["ttft"] < 60 and request["parts"] is None
        assert picture(door)["replicas"][0]["running"] == 1 and picture(door)["replicas"][0]["kv_used"] == 128
        assert picture(door, "?request=another")["request"] is None and picture(door, "")["request"] is None
        sock.close()
        assert eventually(lambda: picture(door)["replicas"][0]["running"] == 0)


def test_a_handed_over_request_goes_through_the_stages() -> None:
    prefill, decode = (
        Replica(role, Hello(role, [Member(role, "h")], 4, 64, 6400, {}, role)) for role in ("prefill", "decode")
    )
    user = SimpleNamespace(request=SimpleNamespace())
    tracked = Tracked(user, None, TextStream(None, []), time.monotonic(), None, None, 0, uid=7)  # type: ignore[arg-type]
    prompt = SimpleNamespace(tracked=tracked, answer=None, closed=False)
    assert stage(prompt) == "queue"
    tracked.decode, tracked.prefill, tracked.path = decode, prefill, ("prefill", "decode")
    prefill.add_prompt(7, 100)
    assert stage(prompt) == "queue", "the decode replica has no pages for it yet"
    tracked.begun = True
    assert stage(prompt) == "prefill"
    prefill.hear(Load(36, 2, 1, 0, {7: 36}))
    assert stage(prompt) == "prefill"
    prefill.hear(Load(0, 2, 1, 0, {7: 0}))
    assert stage(prompt) == "transfer"
    tracked.prefill, tracked.first, tracked.parts = None, tracked.submitted + 0.5, Parts(0.1, 0.25, 0.125, 0.025)
    assert stage(prompt) == "decode"
    prompt.answer = object()
    found = whereabouts(prompt)
    assert found.state == "done" and (found.prefill, found.decode) == ("prefill", "decode")
    assert found.parts == Parts(0.1, 0.25, 0.125, 0.025)
    assert found.ttft == pytest.approx(0.5)


def test_only_the_latest_requests_are_remembered() -> None:
    watched, prompts = Watched(), [object() for _ in range(MOST_WATCHED + 2)]
    for i, prompt in enumerate(prompts):
        watched.add(str(i), prompt)
        watched.add("", prompt)
        watched.add("x" * 129, prompt)
    assert watched.get("1") is None and watched.get("2") is prompts[2] and watched.get("") is None
    assert watched.get("x" * 129) is None and watched.get(str(MOST_WATCHED + 1)) is prompts[-1]


@pytest.fixture
def chromium() -> tuple[Any, str]:
    """Playwright's API, and the path of a browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser's test needs Playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("the browser's test needs a Chromium")
    return playwright, path


@pytest.fixture
def address(tiny: Path, chromium: tuple[Any, str]) -> Iterator[str]:
    """The page of a router with a prefill and a decode job."""
    router, http = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    common = ["--router", router, "--model", str(tiny)]
    jobs = [Job(["--role", role, *common], ranks=2) for role in ("prefill", "decode")]
    jobs.append(Job(["--role", "router", *common, "--http", http]))
    yield f"http://{http}"
    jobs[-1].signal(signal.SIGINT)
    for job in reversed(jobs):
        assert job.finish()[0] == 0


def test_a_talk_in_a_browser(chromium: tuple[Any, str], address: str, tmp_path: Path) -> None:
    playwright, path = chromium
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 780})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        playwright.expect.set_options(timeout=60_000)
        for _ in range(600):  # until the router listens
            with suppress(playwright.Error):
                page.goto(address)
                break
            time.sleep(0.1)
        errors.clear()
        expect = playwright.expect
        expect(page.locator("#health")).to_have_text("serving")
        expect(page.locator(".replica.prefill")).to_have_count(2)
        expect(page.locator(".replica.decode")).to_have_count(2)
        page.select_option("#mode", "completion")
        page.fill("#max_tokens", "40")
        page.fill("#text", "In the beginning God created")
        page.press("#text", "Enter")
        expect(page.locator("#stages .decode.now")).to_be_visible()  # seen while it decodes
        expect(page.locator("#legend b")).to_have_count(4)  # the parts of its time to first token
        expect(page.locator(".replica.mine")).to_have_count(2)
        expect(page.locator("#send")).to_be_enabled()
        answer = page.locator(".turn").nth(1).inner_text()
        assert len(answer.split()) > 5
        page.select_option("#mode", "chat")
        page.fill("#text", "river")
        page.click("#send")
        expect(page.locator(".turn")).to_have_count(4)
        expect(page.locator("#send")).to_be_enabled()
        expect(page.locator("#stages .now")).to_have_count(0)  # it has ended
        page.fill("#max_tokens", "1000000")
        page.fill("#text", "too much")
        page.click("#send")
        expect(page.locator(".turn.error")).to_contain_text("max_model_len")
        page.fill("#max_tokens", "1500")
        page.fill("#text", "In the beginning")
        page.select_option("#mode", "completion")
        page.click("#send")
        expect(page.locator(".replica.decode.mine")).to_contain_text("1 of 64 requests")
        page.screenshot(path=tmp_path / "page.png")
        page.click("#stop")
        expect(page.locator("#send")).to_be_enabled()
        expect(page.locator("#stages .now")).to_have_count(0)
        expect(page.locator(".replica.decode.mine")).to_contain_text("0 of 64 requests")  # nothing is left behind
        browser.close()
    assert not [error for error in errors if "400" not in error], errors
