"""Input lines are read as they are written, whatever they contain and whoever writes them, without blocking anyone."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import random
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from disagg.front import lines as module
from disagg.front.lines import Lines
from tests.conftest import eventually

GOOD = '{"prompt": "x"}'


def read_all(lines: Lines) -> list[str]:
    got: list[str] = []

    def ended() -> bool:
        while (line := lines.next()) is not None:
            got.append(line)
        return lines.ended

    assert eventually(ended)
    return got


@pytest.fixture
def lines_of(tmp_path: Path) -> Callable[[bytes], list[str]]:
    def read(data: bytes) -> list[str]:
        (tmp_path / "in").write_bytes(data)
        return read_all(Lines(str(tmp_path / "in")))

    return read


@pytest.mark.parametrize("block", [1, 2, 3, 7, 2**16])
def test_line_ends_and_characters_survive_any_cut_into_blocks(
    block: int, lines_of: Callable[[bytes], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all three kinds. What Unicode also calls a line end is none: JSON may hold it as it is."""
    monkeypatch.setattr(module, "BLOCK", block)
    parts = ["a", " ", "é\N{PILE OF POO}", "x\u2028\u2029\x85y", "\x0b\x0c", "end"]
    for ends in itertools.product(("\n", "\r\n", "\r"), repeat=3):
        text = "".join(part + end for part, end in zip(parts, itertools.cycle(ends), strict=False))
        assert lines_of(b"\xef\xbb\xbf" + text.encode()) == [*parts, ""]


def test_bytes_that_are_not_utf8_can_be_told(lines_of: Callable[[bytes], list[str]]) -> None:
    data = b"fine\n\xff\xfe\x00\ncut \xc3"
    assert [line.encode(errors="surrogateescape") for line in lines_of(data)] == data.split(b"\n")


def test_a_file_of_any_size_comes_whole(lines_of: Callable[[bytes], list[str]]) -> None:
    rng = random.Random(0)
    expected = ["x" * rng.choice((0, 1, 100, 100_000)) for _ in range(300)]
    assert lines_of("\n".join(expected).encode()) == expected


def test_an_overlong_line_is_cut_and_the_next_one_is_whole(
    lines_of: Callable[[bytes], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One character more than allowed shows that it was."""
    monkeypatch.setattr(module, "LONGEST", 100_000)
    got = lines_of(b"a" * 100_000 + b"\n" + b"b" * 1_000_000 + b"\nnext")
    assert [len(line) for line in got] == [100_000, 100_001, 4] and got[2] == "next"


def test_a_large_file_is_not_held_in_memory(tmp_path: Path) -> None:
    """The thread stops reading when so many blocks wait."""
    path = tmp_path / "in"
    path.write_bytes(b"x" * 999 + b"\n")
    os.truncate(path, 64 * 2**20)  # zeros
    lines = Lines(str(path))
    assert eventually(lines._blocks.full)
    time.sleep(0.1)
    assert os.lseek(lines._file.fileno(), 0, os.SEEK_CUR) <= (module.AHEAD + 1) * module.BLOCK


@pytest.mark.parametrize("kind", ["pipe", "fifo"])
def test_a_silent_writer_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    """A FIFO may not even have one yet."""
    if kind == "fifo":
        path = tmp_path / "fifo"
        os.mkfifo(path)
        lines = Lines(str(path))
        assert lines.next() is None and not lines.ended
        time.sleep(0.1)
        assert lines.next() is None and not lines.ended
        writer = os.open(path, os.O_WRONLY)
    else:
        reader, writer = os.pipe()
        lines = Lines(f"/dev/fd/{reader}")
    got: list[str] = []

    def comes(expected: list[str]) -> bool:
        def there() -> bool:
            while (line := lines.next()) is not None:
                got.append(line)
            return got == expected

        return eventually(there)

    assert lines.next() is None
    os.write(writer, b"one\ntw")
    assert comes(["one"]) and lines.next() is None and not lines.ended
    os.write(writer, b"o\n")
    assert comes(["one", "two"])
    os.close(writer)
    if kind == "pipe":
        os.close(reader)
    assert comes(["one", "two", ""]) and lines.ended


def test_a_dash_is_stdin(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("one\ntwo")
    stdin = os.dup(0)
    with (tmp_path / "in").open() as file:
        os.dup2(file.fileno(), 0)
    try:
        assert read_all(Lines("-")) == ["one", "two"]
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)


@pytest.mark.parametrize("name", ("missing.jsonl", "", "x" * 300), ids=lambda name: name[:20])
def test_an_input_that_cannot_be_read_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--input .*: cannot be read") as caught:
        Lines(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


def zipped(data: bytes) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("in.jsonl", data)
    return file.getvalue()


OTHERS = {
    "gzip": gzip.compress(GOOD.encode()),
    "zip": zipped(GOOD.encode()),
    "xz": lzma.compress(GOOD.encode()),
    "bzip2": bz2.compress(GOOD.encode()),
    "zstd": bytes.fromhex("28b52ffd0458790000") + GOOD.encode(),
    "UTF-16": GOOD.encode("utf-16"),
    "a JSON array": b"\n" + json.dumps([{"prompt": "x"}] * 2).encode(),
    "JSON spread over several lines": b"\xef\xbb\xbf" + json.dumps({"prompt": "x"}, indent=1).encode(),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("through", ["file", "pipe"])
def test_another_format_is_refused_once_and_by_its_name(name: str, through: str, tmp_path: Path) -> None:
    message = f"--input .*: it is {name}; it must be text in UTF-8, one JSON object a line"
    if through == "file":
        (tmp_path / "in").write_bytes(OTHERS[name])
        with pytest.raises(ValueError, match=message):
            Lines(str(tmp_path / "in"))
        return
    reader, writer = os.pipe()
    os.write(writer, OTHERS[name])
    os.close(writer)
    with pytest.raises(ValueError, match=message):
        read_all(Lines(f"/dev/fd/{reader}"))
    os.close(reader)


@pytest.mark.parametrize("first", ('{"a": 1}', "{x", "{ }", "5", " {", "not JSON"))
def test_a_bad_first_line_is_no_other_format(first: str, lines_of: Callable[[bytes], list[str]]) -> None:
    expected = [first, GOOD]
    if first == " {":
        first, expected = first + '"a": 1}', [first + '"a": 1}', GOOD]
    assert lines_of(f"{first}\n{GOOD}".encode()) == expected
