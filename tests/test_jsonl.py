"""A batch of lines: an answer for each, in the input's order however they finish, and a bad line ruins only itself."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Template
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from disagg.jsonl import Job, Writer, read_lines
from disagg.request import PromptEncoder
from disagg.router import Answer

VOCAB_SIZE, LIMIT = 256, 64


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PromptEncoder(tokenizer, Template("{{ messages[0].content }}"))


def make_job(lines: list[str], encoder: PromptEncoder) -> Job:
    return Job(lines, encoder, VOCAB_SIZE, LIMIT)


def good(**fields: Any) -> str:
    return json.dumps({"prompt_token_ids": [1], **fields})


def answer(job: Job, position: int, text: str = "") -> Answer:
    return Answer(job.requests[position].id, text, [], "stop", 1, 0, 0.0, 0.0)


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    source = tmp_path / "in.jsonl"
    source.write_text("")
    return source, tmp_path / "out.jsonl"


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_answers_are_written_in_input_order_each_as_soon_as_it_can_be(
    order: tuple[int, ...], files: tuple[Path, Path], encoder: PromptEncoder
) -> None:
    source, output = files
    lines = [good(id="a"), "", good(id="b"), "bad", good(id="c"), "  ", good(id="d")]
    ids = ["a", "b", 4, "c", "d"]  # the bad line is answered from the start
    job = make_job(lines, encoder)
    assert [user.id for user in job.requests] == ["a", "b", "c", "d"]
    writer, finished = Writer(str(output), str(source)), {4}
    writer.flush(job.answers)
    assert written(output) == []
    for position in order:
        job.deliver(position, answer(job, position, f"text {position}"))
        writer.flush(job.answers)
        finished.add(job.requests[position].id)
        ready = list(itertools.takewhile(lambda one: one in finished, ids))
        assert [line["id"] for line in written(output)] == ready
    writer.close()
    assert [line["text"] for line in written(output)] == ["text 0", "text 1", "", "text 2", "text 3"]
    assert [("error" in line) for line in written(output)] == [False, False, True, False, False]


def test_a_bad_line_is_answered_by_its_own_id_or_else_its_number(encoder: PromptEncoder) -> None:
    lines = [
        good(id="fine"),
        '{"id": "mine", "prompt": ""}',
        "",
        "not JSON",
        '{"prompt": 5}',
        "[1, 2]",
        '{"id": null, "top_p": 3, "prompt": "x"}',
        good(),
    ]
    job = make_job(lines, encoder)
    refused = [(a.id, a.finish_reason, a.error[:8]) for a in job.answers if a is not None]
    assert refused == [
        ("mine", "error", "line 2: "),
        (4, "error", "line 4: "),
        (5, "error", "line 5: "),
        (6, "error", "line 6: "),
        (7, "error", "line 7: "),
    ]
    assert "prompt is ''" in job.answers[1].error and "top_p is 3" in job.answers[5].error
    assert [user.id for user in job.requests] == ["fine", 8]
    assert job.num_refused == 5 and len(job.answers) == 7


@pytest.mark.parametrize("lines", ([], [""], ["", "  ", "\t"]))
def test_an_input_of_nothing_is_a_job_of_nothing(
    lines: list[str], files: tuple[Path, Path], encoder: PromptEncoder
) -> None:
    source, output = files
    source.write_text("\n".join(lines))
    job = make_job(read_lines(str(source)), encoder)
    assert (job.requests, job.answers, job.num_refused) == ([], [], 0)
    writer = Writer(str(output), str(source))
    writer.flush(job.answers)
    writer.close()
    assert output.read_text() == ""


def test_an_answer_survives_the_file_whatever_its_text_holds(files: tuple[Path, Path], encoder: PromptEncoder) -> None:
    source, output = files
    texts = ["two\nlines", "\u2028\x85\x00", "\N{PILE OF POO}", '"}', "\ufffd", "\ud800"]
    ids = [*texts[:-1], "half of a pair is no id"]
    job = make_job([good(id=one) for one in ids], encoder)
    writer = Writer(str(output), str(source))
    for position in random.Random(0).sample(range(len(texts)), len(texts)):
        job.deliver(position, answer(job, position, texts[position]))
        writer.flush(job.answers)
    writer.close()
    assert [(line["id"], line["text"]) for line in written(output)] == list(zip(ids, texts, strict=True))


@pytest.mark.parametrize("name", ("", "missing/out.jsonl", "in.jsonl/out.jsonl", "x" * 300), ids=lambda name: name[:20])
def test_an_output_that_cannot_be_written_is_refused_by_name(name: str, files: tuple[Path, Path]) -> None:
    source, output = files
    path = str(output.parent / name)
    with pytest.raises(ValueError, match="--output .*: cannot be written") as caught:
        Writer(path, str(source))
    assert path in str(caught.value)


@pytest.mark.parametrize("link", (None, "symlink_to", "hardlink_to"))
def test_the_input_is_never_overwritten_by_whatever_name_it_goes(link: str | None, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "other.jsonl"
    source.write_text(good())
    if link is None:
        output = tmp_path / ".." / tmp_path.name / "in.jsonl"
    else:
        getattr(output, link)(source)
    with pytest.raises(ValueError, match="it is the --input file"):
        Writer(str(output), str(source))
    assert source.read_text() == good()


def test_an_older_output_is_replaced(files: tuple[Path, Path]) -> None:
    source, output = files
    output.write_text("from an older run\n" * 5)
    Writer(str(output), str(source)).close()
    assert output.read_text() == ""


@pytest.mark.parametrize("name", ("missing.jsonl", "", "x" * 300), ids=lambda name: name[:20])
def test_an_input_that_cannot_be_read_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--input .*: cannot be read") as caught:
        read_lines(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


def test_bytes_that_are_not_utf8_ruin_no_other_line(tmp_path: Path, encoder: PromptEncoder) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        good(id=1).encode() + b"\n\xff\xfe\x00\n" + b'{"id": "\xe9", "prompt": "x"}\n' + good(id=4).encode()
    )
    job = make_job(read_lines(str(path)), encoder)
    assert [user.id for user in job.requests] == [1, 4]
    refused = [(answer.id, answer.error) for answer in job.answers[1:3]]
    what = "line 2: not UTF-8: byte 0xff, character 1", "line 3: not UTF-8: byte 0xe9, character 9"
    assert refused == list(enumerate(what, 2))


@pytest.mark.parametrize("end", ("\n", "\r\n"))
@pytest.mark.parametrize("inside", ("\u2028", "\u2029", "\x85"))
def test_only_a_newline_ends_a_line(inside: str, end: str, tmp_path: Path, encoder: PromptEncoder) -> None:
    """JSON may hold the other characters that Unicode calls line ends, as they are (ensure_ascii=False writes them)."""
    path = tmp_path / "in.jsonl"
    lines = [json.dumps({"id": i, "prompt": f"a{inside}b"}, ensure_ascii=False) for i in range(2)]
    path.write_bytes((end.join(lines) + end).encode())
    job = make_job(read_lines(str(path)), encoder)
    assert [a.error for a in job.answers if a is not None] == []
    assert [user.id for user in job.requests] == [0, 1]


def test_an_id_that_was_taken_can_be_written_from_however_deep_in_the_program(
    files: tuple[Path, Path], encoder: PromptEncoder
) -> None:
    def down(levels: int, call: Any) -> None:
        call() if levels == 0 else down(levels - 1, call)

    source, output = files
    for depth in range(900, 1000):
        job = make_job([f'{{"id": {"[" * depth}{"]" * depth}, "prompt": "x"}}'], encoder)
        if job.requests:
            job.deliver(0, answer(job, 0))
        writer = Writer(str(output), str(source))
        down(30, lambda job=job, writer=writer: writer.flush(job.answers))
        writer.close()
        assert len(output.read_text().split("\n")) == 2
