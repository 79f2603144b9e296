"""The file of answers: in order, and written early. Existing answers are lost only if the user asks for it."""

import itertools
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from disagg.front.answer import INTERRUPTED, Answer, refusal
from disagg.front.output import Output
from tests.conftest import ROOT

NOBODY = os.stat_result([0] * 10)  # an input that is no file here


def answer(id: str | int, text: str = "") -> Answer:
    return Answer(id, text, [], "stop", 1, 0, 0.0, 0.0)


def line(id: str | int, error: str | None = None) -> str:
    return json.dumps((refusal(id, error) if error else answer(id)).as_dict()) + "\n"


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_answers_are_written_in_order_each_as_soon_as_it_can_be(order: tuple[int, ...], tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"), NOBODY)
    put: set[int] = set()
    for place in order:
        output.put(place, answer(place))
        put.add(place)
        ready = list(itertools.takewhile(lambda one: one in put, itertools.count()))
        assert [line["id"] for line in written(tmp_path / "out")] == ready
    assert not output._lines, "what is written is not kept"
    output.close()


def test_an_answer_survives_the_file_whatever_its_text_holds(tmp_path: Path) -> None:
    texts = ["two\nlines", "\u2028\x85\x00", "\N{PILE OF POO}", '"}', "\ufffd", "\ud800"]
    output = Output(str(tmp_path / "out"), NOBODY)
    for place, text in enumerate(texts):
        output.put(place, answer(place, text))
    output.close()
    assert [line["text"] for line in written(tmp_path / "out")] == texts


@pytest.mark.parametrize("name", ("", "missing/out", "file/out", "x" * 300), ids=lambda name: name[:20])
def test_an_output_that_cannot_be_written_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--output .*: cannot be written") as caught:
        Output(str(tmp_path / name), NOBODY)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("flag", ("refuse", "overwrite", "resume"))
@pytest.mark.parametrize("link", (None, "symlink_to", "hardlink_to"))
def test_the_input_is_never_overwritten_by_whatever_name_it_goes(flag: str, link: str | None, tmp_path: Path) -> None:
    source, path = tmp_path / "in", tmp_path / "other"
    source.write_text(line("a"))
    if link is None:
        path = tmp_path / ".." / tmp_path.name / "in"
    else:
        getattr(path, link)(source)
    with pytest.raises(ValueError, match="it is the --input file"):
        Output(str(path), source.stat(), flag)
    assert source.read_text() == line("a")


def test_an_output_that_exists_is_refused_unless_it_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("an earlier run's\n")
    with pytest.raises(ValueError, match=f"--output {path}: it exists; --existing overwrite replaces"):
        Output(str(path), NOBODY)
    assert path.read_text() == "an earlier run's\n"
    path.write_text("")  # as mktemp makes it
    output = Output(str(path), NOBODY)
    output.put(0, answer("a"))
    output.close()
    assert path.read_text() == line("a")


@pytest.mark.parametrize("answers", (0, 1))
def test_overwriting_begins_with_the_first_answer_or_the_end(answers: int, tmp_path: Path) -> None:
    """A run that cannot start has changed nothing."""
    path, old = tmp_path / "out", "an earlier run's\n" * 100
    path.write_text(old)
    output = Output(str(path), NOBODY, existing="overwrite")
    output.put(1, answer("b"))
    assert path.read_text() == old
    for place in range(answers):
        output.put(place, answer("a"))
        assert path.read_text() == line("a") + line("b")
    output.close()
    assert path.read_text() == (line("a") + line("b") if answers else "")


TAILS = {
    "nothing": "",
    "a torn line": line("c")[:-10],
    "a line without its end": line("c")[:-1],
    "zeros": "\0" * 4096,  # as some file systems leave behind when the power fails
    "interrupted": line("c", INTERRUPTED) + line("d") + line("e", INTERRUPTED),
    "interrupted and torn": line("c", INTERRUPTED) + line("d")[:20],
}


@pytest.mark.parametrize("tail", TAILS)
def test_resuming_goes_on_behind_the_answers_that_stay(tail: str, tmp_path: Path) -> None:
    path, kept = tmp_path / "out", line("a") + line(2, "line 2: not JSON")
    path.write_text(kept + TAILS[tail])
    output = Output(str(path), NOBODY, existing="resume")
    assert len(output.kept) == 2 and path.read_text() == kept + TAILS[tail]
    assert [output.kept.popleft(), output.kept.popleft()] == ["a", 2]  # as when the input is compared
    output.put(0, answer("c"))
    assert path.read_text() == kept + line("c")
    output.close()


def test_resuming_keeps_no_answer_in_memory(tmp_path: Path) -> None:
    """A file of 4 MB takes the memory of a few lines. Its ids alone would take over 50 kB."""
    path, count = tmp_path / "out", 400
    path.write_text("".join(json.dumps(answer(f"{i:0100}", "x" * 10_000).as_dict()) + "\n" for i in range(count)))
    tracemalloc.start()
    output = Output(str(path), NOBODY, existing="resume")
    assert tracemalloc.get_traced_memory()[0] < 50_000
    assert [int(output.kept.popleft()) for _ in range(len(output.kept))] == list(range(count))
    assert tracemalloc.get_traced_memory()[1] < 150_000
    tracemalloc.stop()


def test_what_waits_for_an_earlier_answer_is_known(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"), NOBODY)
    for place in (2, 1):
        output.put(place, answer(place))
    assert output.held == len(line(2) + line(1))
    output.put(0, answer(0))
    assert output.held == 0


def test_a_dash_is_stdout(capfd: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written even if it leads to a file with content, which the shell has opened."""
    monkeypatch.chdir(tmp_path)
    print("before", flush=True)
    output = Output("-", NOBODY)
    for place in (1, 0):
        output.put(place, answer(place))
    output.close()
    print("after", flush=True)
    assert capfd.readouterr().out == f"before\n{line(0)}{line(1)}after\n"
    assert list(tmp_path.iterdir()) == []


def test_a_reader_of_stdout_who_leaves_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setattr(os, "dup", lambda fd: {1: writer}[fd])
    output = Output("-", NOBODY)
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        output.put(0, answer(0))
    output.close()


def test_resuming_what_is_not_there_begins(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"), NOBODY, existing="resume")
    output.put(0, answer("a"))
    output.close()
    assert (tmp_path / "out").read_text() == line("a")


@pytest.mark.parametrize("bad", ("text\n", "[1]\n", '{"text": ""}\n', "[" * 100_000 + "\n"), ids=lambda bad: bad[:9])
def test_what_holds_no_answers_is_not_resumed(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text(line("a") + bad + line("b"))
    with pytest.raises(ValueError, match=f"{path}: line 2 is no answer, which --existing resume needs"):
        Output(str(path), NOBODY, existing="resume")
    assert path.read_text() == line("a") + bad + line("b")


def test_an_output_that_was_never_compared_with_its_input_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text(line("a") + "torn")
    Output(str(path), NOBODY, existing="resume").close()
    assert path.read_text() == line("a") + "torn"


@pytest.mark.parametrize("flag", ("refuse", "overwrite", "resume"))
def test_an_output_that_another_process_writes_is_refused(flag: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    code = (
        "import os, sys; from disagg.front.output import Output\n"
        f"output = Output({str(path)!r}, os.stat(os.devnull)); print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(ValueError, match=f"--output {path}: another process writes it"):
            Output(str(path), NOBODY, flag)
    Output(str(path), NOBODY).close()  # the lock ends with its process, however that ends


@pytest.mark.parametrize("flag", ("refuse", "overwrite"))
def test_what_is_no_file_is_written_as_it_is(flag: str, tmp_path: Path) -> None:
    null = Output(os.devnull, os.stat(os.devnull), flag)  # from there, too
    null.put(0, answer("a"))
    null.close()
    with pytest.raises(ValueError, match="--output /dev/full: cannot be written .No space left on device"):
        Output("/dev/full", NOBODY, flag).put(0, answer("a"))
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    fifo = Output(str(tmp_path / "fifo"), NOBODY, flag)
    fifo.put(0, answer("a"))
    assert os.read(reader, 1000).decode() == line("a")
    os.close(reader)
    with pytest.raises(ValueError, match="fifo: cannot be written .Broken pipe"):
        fifo.put(1, answer("b"))
    with pytest.raises(ValueError, match="--existing resume needs a file that can be read again"):
        Output(os.devnull, NOBODY, existing="resume")


def test_a_full_disk_leaves_what_resuming_mends(tmp_path: Path) -> None:
    """A limit on the file's size cuts a line in the middle, as a full disk does."""
    path = tmp_path / "out"
    code = (
        "import os, resource, signal; from tests.test_output import NOBODY, Output, answer, line\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "size = len(line('a')) + 20; resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
        f"output = Output({str(path)!r}, NOBODY); output.put(0, answer('a'))\n"
        "try: output.put(1, answer('b'))\n"
        "except ValueError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert out.stdout == f"--output {path}: cannot be written (File too large)\n", out.stderr
    assert path.read_text() == line("a") + line("b")[:20]
    output = Output(str(path), NOBODY, existing="resume")
    assert output.kept.popleft() == "a" and not output.kept
    output.put(0, answer("b"))
    output.close()
    assert path.read_text() == line("a") + line("b")
