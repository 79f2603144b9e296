"""Jobs over several hosts, each with an address of its own (tests/hosts.py): pulled cables, and networks that stall.

The router, prefill over two machines, decode over two more, and a decode job on one that serves on meanwhile.
`pytest -m long tests/test_hosts.py` pulls a cable for a minute, with the time-outs that users have.
"""

import json
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from disagg.handoff.endpoints import TRANSPORTS
from model.config import ModelConfig
from parallel.load_counter import save_recording
from tests.commands import finish_torchrun, torchrun
from tests.conftest import write_secret
from tests.deployment import answers_alone, run
from tests.hostile_ports import is_torchs, listening
from tests.hosts import NO_NAMES, Host, hosts, obstacle
from tests.placed import REDUNDANT
from tests.processes import Job
from tests.test_faults import QUICK, SOON
from tests.test_transports import needs
from tests.town import Town, town

WHY_NOT = obstacle()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
REQUESTS = [
    {"id": str(i), "prompt": f"And the LORD spake {i}", "max_tokens": 30, "ignore_eos": True} for i in range(16)
]
FEW = ("--max-batch", "1")  # so that the requests outlast what happens to the cable
COLLECTIVE_S = 6


@pytest.fixture(scope="module")
def machines() -> Iterator[list[Host]]:
    with hosts(6) as made:
        yield made


@pytest.fixture(scope="module")
def expected(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    folder = tmp_path_factory.mktemp("alone")
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(request) + "\n" for request in REQUESTS))
    return {answer["id"]: answer["token_ids"] for answer in answers_alone(small, source, folder / "out.jsonl")}


@pytest.fixture
def place(request: pytest.FixtureRequest, machines: list[Host], small: Path, tmp_path: Path) -> Iterator[Town]:
    """A town whose jobs have a secret, with cables that are plugged in again. Its parameter: more constants."""
    with town(tmp_path, small, machines[0], **QUICK, **getattr(request, "param", {})) as made:
        made.flags = ("--secret-file", str(write_secret(tmp_path)))
        yield made
    for machine in machines:
        machine.plug_cable()


def all_right(place: Town, expected: dict[str, list[int]]) -> None:
    router = place.jobs[0]
    place.until(lambda: router.statuses != [None], SOON)
    assert router.statuses == [0] and "Traceback" not in router.said, place.said
    assert {answer["id"]: answer.get("token_ids") for answer in place.answers("out")} == expected, place.said


def test_the_tokens_of_one_process_over_five_machines(
    place: Town, machines: list[Host], expected: dict[str, list[int]]
) -> None:
    place.router(REQUESTS, "out")
    jobs = [
        place.worker("prefill", 2, "--attn-tp", "2", hosts=machines[1:3]),
        place.worker("decode", 2, hosts=machines[3:5]),
    ]
    all_right(place, expected)
    first, second = (machine.address for machine in machines[1:3])
    assert f"a prefill replica at {first} and {second} joined" in place.jobs[0].said, place.said
    place.until(lambda: all(job.statuses == [0, 0] for job in jobs), SOON)


def ended(router: Job) -> int:
    """Return how many requests have ended, by its latest line. The answers themselves wait for earlier ones."""
    return int((re.findall(r"; (\d+) ended", router.said) or ["0"])[-1])


def start_two_decode_jobs(place: Town, machines: list[Host]) -> tuple[Job, Job]:
    """Return the router, which is fed, and the decode job that has two machines. Another has a machine of its own."""
    router = place.fed_router("out", "--log-interval", "0.2")
    place.worker("prefill", 1, hosts=machines[1:2])
    over_two = place.worker("decode", 2, *FEW, hosts=machines[3:5])
    place.worker("decode", 1, *FEW, hosts=machines[5:6])
    place.until(lambda: router.said.count("joined") == 4, SOON)
    return router, over_two


def test_a_cable_that_is_pulled_and_plugged_in_again(
    place: Town, machines: list[Host], expected: dict[str, list[int]]
) -> None:
    """A second machine of a decode job is away for some seconds: the other job serves, and this one comes back."""
    router, away = start_two_decode_jobs(place, machines)
    place.feed(REQUESTS[:12], "out")
    machines[4].pull_cable()
    pulled = time.monotonic()
    place.until(lambda: "is lost" in router.said, 10)
    assert time.monotonic() - pulled < 5
    count = ended(router)
    place.until(lambda: ended(router) > count or count == 12, SOON)
    machines[4].plug_cable()
    place.until(lambda: "is back" in router.said, 20)
    place.feed(REQUESTS[12:], "out")
    place.stop_feeding("out")
    all_right(place, expected)
    place.until(lambda: away.statuses == [0, 0], SOON)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_cable_that_is_pulled_for_a_minute(
    small: Path, tmp_path: Path, machines: list[Host], expected: dict[str, list[int]]
) -> None:
    """With the time-outs that users have: the router knows in 10 s, and takes the job back when the cable is there."""
    with town(tmp_path, small, machines[0]) as place:
        place.flags = ("--secret-file", str(write_secret(tmp_path)))
        router, away = start_two_decode_jobs(place, machines)
        place.feed(REQUESTS[:8], "out")
        machines[4].pull_cable()
        pulled = time.monotonic()
        place.until(lambda: "is lost" in router.said, 15)
        print(f"the router knew after {time.monotonic() - pulled:.1f} s")
        place.until(lambda: ended(router) == 8, 50)
        print(f"all that it had was answered after {time.monotonic() - pulled:.1f} s")
        time.sleep(pulled + 60 - time.monotonic())
        machines[4].plug_cable()
        plugged = time.monotonic()
        place.until(lambda: "is back" in router.said, 90)  # TCP tries again after as long as it was away
        print(f"the job was back {time.monotonic() - plugged:.1f} s after the cable")
        place.feed(REQUESTS[8:], "out")
        place.stop_feeding("out")
        all_right(place, expected)
        place.until(lambda: away.statuses == [0, 0], SOON)


@pytest.mark.parametrize("place", [{"disagg__loop__COLLECTIVE_S": COLLECTIVE_S}], indirect=True)
def test_a_cable_that_is_pulled_for_good(place: Town, machines: list[Host], expected: dict[str, list[int]]) -> None:
    """The job that has lost a machine ends on both, in the time that a collective may take, and nothing is lost."""
    _, cut = start_two_decode_jobs(place, machines)
    place.feed(REQUESTS, "out")
    place.stop_feeding("out")
    machines[4].pull_cable()
    all_right(place, expected)
    place.until(lambda: None not in cut.statuses, COLLECTIVE_S + 10)
    assert all(status != 0 for status in cut.statuses), place.said
    for number, machine in enumerate(machines[3:5]):  # each line says where it comes from, also in a traceback
        name = f"[{machine.namespace} rank {number}] "
        assert f"{name}Traceback" in cut.said and f"{name}RuntimeError: " in cut.said, cut.said


def test_a_job_that_the_router_does_not_hear(place: Town, machines: list[Host], expected: dict[str, list[int]]) -> None:
    """Their connections stand, and nothing passes. The other job serves, and this one is taken back."""
    router, stalled = start_two_decode_jobs(place, machines)
    place.feed(REQUESTS[:12], "out")
    for machine in machines[3:5]:
        machine.stall(machines[0])
    began = time.monotonic()
    try:
        place.until(lambda: "is lost" in router.said, 10)
        assert time.monotonic() - began < 5
        count = ended(router)
        place.until(lambda: ended(router) > count or count == 12, SOON)
    finally:
        for machine in machines[3:5]:
            machine.flow()
    place.until(lambda: "is back" in router.said, 20)
    place.feed(REQUESTS[12:], "out")
    place.stop_feeding("out")
    all_right(place, expected)
    place.until(lambda: stalled.statuses == [0, 0], SOON)


LINKS_S = 3  # in place of 60
LIMITS = ("connect", "link", "receive_link", "send_link")
LIMITS += ("transports__torch_dist", "transports__nixl_ucx", "transports__mooncake_tcp")
QUICK_LINKS = {f"disagg__handoff__{name}__TIMEOUT": timedelta(seconds=LINKS_S) for name in LIMITS}


@pytest.mark.parametrize("place", [QUICK_LINKS], indirect=True)
@pytest.mark.parametrize(
    ("library", "what"), [("torch", "everything"), *((library, "all but the pipe") for library in TRANSPORTS)]
)
def test_a_link_over_which_nothing_passes(
    place: Town, machines: list[Host], expected: dict[str, list[int]], library: str, what: str
) -> None:
    """Between decode and one of two prefill jobs, both of which the router hears.

    Requests that wait for it go to the other one in time, and later ones at once.
    """
    needs(library)
    few = [request | {"max_tokens": 12} for request in REQUESTS]
    router = place.fed_router("out", "--log-interval", "0.2")
    flags = "--transport", library
    jobs = {m: place.worker("prefill", 1, *flags, hosts=[m]) for m in machines[1:3]}
    place.worker("decode", 1, *flags, *FEW, hosts=machines[3:4])
    place.until(lambda: router.said.count("joined") == 3, SOON)
    place.feed(few[:2], "out")
    place.until(lambda: ended(router) == 2, SOON)
    stuck = min(jobs, key=lambda m: router.said.index(f"replica at {m.address} joined"))  # the router prefers it
    ports = listening(jobs[stuck].ranks[0].pid)
    pipes = [port for port in ports if not stuck.run(lambda port=port: is_torchs(port, stuck.address))]
    assert 0 < len(pipes) < len(ports)
    machines[3].stall(stuck, pipes if what == "all but the pipe" else ())
    place.feed(few[2:], "out")
    place.stop_feeding("out")
    pauses, count, since = [], 2, time.monotonic()
    try:
        while router.statuses == [None]:
            if (now := ended(router)) > count:
                pauses.append(time.monotonic() - since)
                count, since = now, time.monotonic()
            assert time.monotonic() - since < SOON, place.said
            time.sleep(0.02)
        all_right(place, {id: tokens[:12] for id, tokens in expected.items()})
        assert re.search(r"retries  \d+", router.said), "nothing was on its way"
        assert pauses and max(pauses) < LINKS_S + 5, pauses
    finally:
        machines[3].flow()


def test_torchrun_over_two_machines(machines: list[Host], tiny: Path) -> None:
    """As a user types it, one launcher per machine."""
    prompt = ("--model", str(tiny), "--prompt", "In the beginning", "--max-tokens", "8")
    alone = run(*prompt)
    meet = (f"--master-addr={machines[1].address}", "--master-port=29500")
    launchers = [
        torchrun(1, *prompt, "--insecure", nodes=("--nnodes=2", f"--node-rank={number}", *meet), host=machine)
        for number, machine in enumerate(machines[1:3])
    ]
    ended = [finish_torchrun(launcher) for launcher in launchers]
    assert [code for code, *_ in ended] == [0, 0], ended
    assert ended[0][1] == alone[1] and not ended[1][1], ended
    said = [line for line in ended[0][2].splitlines() if re.search("unified:|tok/s", line)]
    assert said and all(line.startswith(f"[{machines[1].namespace} rank 0] ") for line in said), ended


def test_experts_are_placed_by_machine(machines: list[Host], tiny: Path, tmp_path: Path) -> None:
    """Two machines of two ranks. Groups of experts stay on one machine, and a rank prefers replicas on its own."""
    config = ModelConfig.from_pretrained(tiny)
    layers, experts, groups = config.num_moe_layers, config.n_routed_experts, config.n_group
    loads = torch.arange(layers * experts).view(1, layers, experts) % 17**2 + 1
    save_recording(tmp_path / "loads", list(loads), layers, experts)
    places = [machine for machine in machines[1:3] for _ in range(2)]
    code, out, err = Job([str(tmp_path / "loads")], 4, module="tests.placed", env=NO_NAMES, hosts=places).finish()
    assert code == 0, err
    ranks = {told["rank"]: told for told in map(json.loads, out.splitlines())}
    assert [ranks[rank]["machines"] for rank in range(4)] == [[0, 0, 1, 1]] * 4
    share = (experts + REDUNDANT) // 4
    for rank, told in ranks.items():
        for of_slot in told["placed"][str(groups)]["of_slot"]:
            homes = {(expert * groups // experts, slot // (2 * share)) for slot, expert in enumerate(of_slot)}
            assert len(homes) == groups, "a group is on two machines"
        both = 0
        for of_slot, of_expert in zip(*told["placed"]["1"].values(), strict=True):
            for expert, slot in enumerate(of_expert):
                replicas = {n // share for n, held in enumerate(of_slot) if held == expert}
                here = {home for home in replicas if home // 2 == rank // 2}
                both += 0 < len(here) < len(replicas)
                assert slot // share in ({rank} & replicas or here or replicas)
        assert both, "no expert is on both machines: the test shows nothing"
