"""A batch of lines: one answer per line, in input order, however requests finish. A bad line spoils only itself."""

import itertools
import json
import random
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Template
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from disagg.front import jsonl as module
from disagg.front.answer import INTERRUPTED, Answer, refusal
from disagg.front.jsonl import JsonLines
from disagg.front.lines import Lines
from disagg.front.output import Output
from disagg.front.parse import Served, UserRequest
from disagg.front.source import Asked
from disagg.front.tokenizer import PromptEncoder
from tests.conftest import eventually

VOCAB_SIZE, LIMIT = 256, 64


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PromptEncoder(tokenizer, Template("{{ messages[0].content }}"))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


class Given:
    """Lines in a list; of `None` there is none yet."""

    def __init__(self, lines: list[str | None]) -> None:
        self._left = deque(lines)

    def next(self) -> str | None:
        return self._left.popleft() if self._left else None

    @property
    def ended(self) -> bool:
        return not self._left


@pytest.fixture
def batch(files: tuple[Path, Path], encoder: PromptEncoder) -> Callable[..., JsonLines]:
    """Of lines that are given or, without any, of the input file."""

    def make(lines: list[str | None] | None = None, **flags: bool) -> JsonLines:
        source, path = files
        source.touch()
        output = Output(str(path), source.stat(), **flags)
        return JsonLines(
            Lines(str(source)) if lines is None else Given(lines), output, Served(encoder, VOCAB_SIZE, LIMIT)
        )

    return make


def good(**fields: Any) -> str:
    return json.dumps({"prompt_token_ids": [1], **fields})


def take_all(batch: JsonLines, most: int = 1000) -> list[Asked]:
    taken: list[Asked] = []

    def exhausted() -> bool:
        taken.extend(batch.take(most))
        return batch.exhausted

    assert eventually(exhausted)
    return taken


def ids_of(taken: list[Asked]) -> list[str | int]:
    return [user.id for user, _ in taken]


def answer(user: UserRequest, text: str = "") -> Answer:
    return Answer(user.id, text, [], "stop", 1, 0, 0.0, 0.0)


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_answers_are_written_in_input_order_each_as_soon_as_it_can_be(
    order: tuple[int, ...], files: tuple[Path, Path], batch: Callable[..., JsonLines]
) -> None:
    lines = [good(id="a"), "", good(id="b"), "bad", good(id="c"), "  ", good(id="d")]
    ids = ["a", "b", 4, "c", "d"]  # the bad line is answered when it is read
    made = batch(lines)
    users = take_all(made)
    assert ids_of(users) == ["a", "b", "c", "d"] and made.total == 5
    finished = {4}
    assert written(files[1]) == []
    for position in order:
        user, client = users[position]
        client.deliver(answer(user, f"text {position}"))
        finished.add(user.id)
        ready = list(itertools.takewhile(lambda one: one in finished, ids))
        assert [line["id"] for line in written(files[1])] == ready
    assert [line["text"] for line in written(files[1])] == ["text 0", "text 1", "", "text 2", "text 3"]
    assert [("error" in line) for line in written(files[1])] == [False, False, True, False, False]


def test_a_bad_line_is_answered_by_its_own_id_or_else_its_number(
    files: tuple[Path, Path], batch: Callable[..., JsonLines]
) -> None:
    lines = [
        '{"id": "mine", "prompt": ""}',
        "",
        "not JSON",
        '{"prompt": 5}',
        "[1, 2]",
        '{"id": null, "top_p": 3, "prompt": "x"}',
        good(),
        good(id="fine"),
    ]
    assert ids_of(take_all(batch(lines))) == [7, "fine"]
    refused = [(line["id"], line["finish_reason"], line["error"][:8]) for line in written(files[1])]
    assert refused == [
        ("mine", "error", "line 1: "),
        (3, "error", "line 3: "),
        (4, "error", "line 4: "),
        (5, "error", "line 5: "),
        (6, "error", "line 6: "),
    ]
    errors = [line["error"] for line in written(files[1])]
    assert "prompt is ''" in errors[0] and "top_p is 3" in errors[4]


@pytest.mark.parametrize("text", ("", "\n", "\n  \n\t"))
def test_an_input_of_nothing_is_a_batch_of_nothing(
    text: str, files: tuple[Path, Path], batch: Callable[..., JsonLines]
) -> None:
    files[0].write_text(text)
    made = batch()
    assert take_all(made) == [] and made.total == 0
    assert files[1].read_text() == ""


def test_bytes_that_are_not_utf8_ruin_no_other_line(files: tuple[Path, Path], batch: Callable[..., JsonLines]) -> None:
    files[0].write_bytes(
        good(id=1).encode() + b"\n\xff\xfe\x00\n" + b'{"id": "\xe9", "prompt": "x"}\n' + good(id=4).encode()
    )
    made = batch()
    users = take_all(made)
    assert ids_of(users) == [1, 4]
    users[0][1].deliver(answer(users[0][0]))
    refused = [(line["id"], line["error"]) for line in written(files[1])[1:]]
    what = "line 2: not UTF-8: byte 0xff, character 1", "line 3: not UTF-8: byte 0xe9, character 9"
    assert refused == list(enumerate(what, 2))


def test_a_line_that_is_too_long_is_refused_without_being_parsed(
    monkeypatch: pytest.MonkeyPatch, files: tuple[Path, Path], batch: Callable[..., JsonLines]
) -> None:
    monkeypatch.setattr(module, "LONGEST", 1000)
    assert ids_of(take_all(batch([good(id="x" * 1000), good(id="next")]))) == ["next"]
    assert "line 1: it is too long; a line must have at most 1,000 characters" in written(files[1])[0]["error"]


def test_lines_are_read_as_they_are_taken(files: tuple[Path, Path], batch: Callable[..., JsonLines]) -> None:
    """20 MB of them. What has been answered is kept no longer."""
    count = 2000
    files[0].write_text("".join(good(id=i, stop=["x" * 10_000]) + "\n" for i in range(count)))
    made = batch()
    position, most = 0, 0
    tracemalloc.start()
    while not made.exhausted:
        taken = made.take(10)
        assert len(taken) <= 10
        for user, client in taken:
            client.deliver(answer(user))
            position += 1
        most = max(most, tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert position == count == made.total
    assert most < 5e6  # bytes, of which 2 MiB are read ahead
    assert [line["id"] for line in written(files[1])] == list(range(count))


def test_lines_are_not_read_while_many_answers_wait_for_an_earlier_one(
    monkeypatch: pytest.MonkeyPatch, files: tuple[Path, Path], batch: Callable[..., JsonLines]
) -> None:
    """Otherwise one slow request would make the router hold all answers behind it."""
    monkeypatch.setattr(module, "MOST_HELD", 2000)
    made = batch([good(id=i) for i in range(100)])
    asked = made.take(10)
    (user, client), *others = asked
    for other, its_client in others:
        its_client.deliver(answer(other, "x" * 300))
    assert made.take(10) == [] and not made.exhausted and files[1].read_text() == ""
    client.deliver(answer(user))
    assert len(written(files[1])) == 10 and len(made.take(10)) == 10


def test_taking_ends_soon_however_much_there_is(
    monkeypatch: pytest.MonkeyPatch, batch: Callable[..., JsonLines], encoder: PromptEncoder
) -> None:
    """Good lines, bad ones, and those that have an answer."""

    def slow(prompt: str, special: bool = True) -> list[int]:
        time.sleep(0.005)
        return [1]

    monkeypatch.setattr(encoder, "text", slow)
    made = batch(['{"prompt": "x"}', '{"prompt": "x", "top_k": "bad"}'] * 500)
    for _ in range(3):
        began = time.monotonic()
        assert 1 <= len(made.take(1000)) < 20
        assert time.monotonic() - began < 0.2


def test_a_silent_input_gives_nothing_and_is_not_exhausted(batch: Callable[..., JsonLines]) -> None:
    made = batch([good(), None, None, good()])
    assert len(made.take(9)) == 1
    assert made.take(9) == [] and not made.exhausted and made.total is None
    assert len(made.take(9)) == 1 and made.exhausted and made.total == 2


LINES = [good(id="a"), "", good(), "bad", good(id="a"), '{"id": "e", "prompt": ""}', good(id=7), good(id="a")]


def serve(batch: JsonLines, rng: random.Random, answers: float = float("inf")) -> None:
    """Answer requests in any order; after so many, the user presses Ctrl-C."""
    open_ones: list[Asked] = []
    while not (batch.exhausted and not open_ones):
        open_ones += batch.take(rng.randint(1, 3))
        if answers <= 0:
            break
        if open_ones:
            user, client = open_ones.pop(rng.randrange(len(open_ones)))
            client.deliver(answer(user, f"text of {user.id}"))
            answers -= 1
    for user, client in open_ones:
        client.deliver(refusal(user.id, INTERRUPTED))
    batch._output.close()


@pytest.mark.parametrize("seed", range(20))
def test_a_run_that_is_broken_and_resumed_ends_like_one_that_is_not(
    seed: int, files: tuple[Path, Path], batch: Callable[..., JsonLines]
) -> None:
    """By Ctrl-C, by a kill (which cuts the last line anywhere), again and again. Ids may come twice."""
    path, rng = files[1], random.Random(seed)
    serve(batch(LINES), rng)
    unbroken = path.read_text()
    assert [line["id"] for line in written(path)] == ["a", 3, 4, "a", "e", 7, "a"]
    path.unlink()
    for _ in range(4):
        serve(batch(LINES, existing="resume"), rng, answers=rng.randrange(5))
        if rng.random() < 0.5:
            path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size + 1)])
    last = batch(LINES, existing="resume")
    serve(last, rng)
    assert path.read_text() == unbroken and last.total == 7
    serve(batch(LINES, existing="resume"), rng)
    assert path.read_text() == unbroken, "there was nothing left to do"


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        (["x"], r"answer 1 in .* has the id 'x', but that line of the input has 'a'"),
        (["a", "a"], r"answer 2 in .* has the id 'a', but that line of the input has 3"),
        (["a", 3, 4, "a", "e", 7, "b"], r"answer 7 in .* has the id 'b', but that line of the input has 'a'"),
        (["a", 3, 4, "a", "e", 7, "a", "more"], r"has 8 answers, the input 7 lines"),
    ],
)
def test_answers_to_another_input_are_left_alone(
    ids: list, problem: str, files: tuple[Path, Path], batch: Callable[..., JsonLines]
) -> None:
    old = "".join(json.dumps(refusal(id, "an error").as_dict()) + "\n" for id in ids) + "torn"
    files[1].write_text(old)
    with pytest.raises(ValueError, match=problem):
        take_all(batch(LINES, existing="resume"))
    assert files[1].read_text() == old


def test_an_id_that_was_taken_can_be_written_from_however_deep_in_the_program(
    files: tuple[Path, Path], batch: Callable[..., JsonLines]
) -> None:
    def down(levels: int, call: Any) -> None:
        call() if levels == 0 else down(levels - 1, call)

    for depth in range(900, 1000):
        files[1].unlink(missing_ok=True)
        made = batch([f'{{"id": {"[" * depth}{"]" * depth}, "prompt": "x"}}'])
        users: list[Asked] = []
        down(30, lambda made=made, users=users: users.extend(made.take(1)))
        for user, client in users:
            down(30, lambda user=user, client=client: client.deliver(answer(user)))
        assert len(files[1].read_text().split("\n")) == 2
