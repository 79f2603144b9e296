"""The front door over its real port, with a replica that answers every request with one token at once."""

import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from disagg.control.messages import Bye, Finish, Hello, Member, Submit, Update, Updates
from disagg.control.ports import WorkerPort
from disagg.front.front_door import FrontDoor
from model.config import ModelConfig
from run import parse_args
from tests.conftest import ROOT, eventually, write_secret

HOST = "127.0.0.1"
SOON_S = 20


class Replica(threading.Thread):
    """Answers as long as `holds` is not set, and then keeps what it gets."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        hello = Hello("unified", [Member("u", HOST)], 64, 1024, 2**20, {}, "u")
        self.worker, self.holds, self.got = WorkerPort(hello, HOST, port), threading.Event(), 0
        self.start()

    def run(self) -> None:
        while True:
            for message in self.worker.poll(100):
                if isinstance(message, Finish):
                    self.worker.send(Bye({}))
                    self.worker.close()
                    return
                if isinstance(message, Submit):
                    self.got += 1
                    if not self.holds.is_set():
                        self.worker.send(Updates([Update(message.request.uid, [9], finish="length")]))


class Serving:
    """A front door that runs in a thread, with its replica."""

    def __init__(self, tiny: Path, *flags: str) -> None:
        args = parse_args(["--model", str(tiny), *flags])
        self.front = FrontDoor(args, ModelConfig.from_pretrained(tiny), (HOST, 0))
        self.stop, self.error = threading.Event(), None
        self.replica = Replica(self.front.port.port)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.front.run(self.stop.is_set, expected=1)
        except Exception as error:
            self.error = error

    def finish(self) -> None:
        self.thread.join(SOON_S)
        assert not self.thread.is_alive()
        self.replica.join(SOON_S)


@pytest.fixture
def serve(tiny: Path) -> Iterator[Callable[..., Serving]]:
    made: list[Serving] = []

    def start(*flags: str) -> Serving:
        made.append(Serving(tiny, *flags))
        return made[-1]

    yield start
    for one in made:
        one.stop.set()
        one.thread.join(SOON_S)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def work(files: tuple[Path, Path]) -> tuple[str, ...]:
    return "--input", str(files[0]), "--output", str(files[1])


def lines(count: int, **fields: str) -> str:
    return "".join(json.dumps({"prompt": f"In {i}", "max_tokens": 1, **fields}) + "\n" for i in range(count))


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_a_batch_is_answered_bad_lines_and_all(
    serve: Callable[..., Serving], files: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    files[0].write_text(lines(3) + "bad\n" + lines(2))
    serving = serve(*work(files))
    serving.finish()
    assert serving.error is None and not serving.front.failed
    assert [line["id"] for line in written(files[1])] == [1, 2, 3, 4, 5, 6]
    assert [line["token_ids"] for line in written(files[1])] == [[9], [9], [9], [], [9], [9]]
    out, err = capsys.readouterr()
    assert out == "" and "1 error, 5 length" in err


def test_stdout_has_the_answers_and_stderr_all_else(
    serve: Callable[..., Serving], files: tuple[Path, Path], capfd: pytest.CaptureFixture
) -> None:
    files[0].write_text(lines(3) + "bad\n")
    serving = serve("--input", str(files[0]), "--output", "-")
    serving.finish()
    out, err = capfd.readouterr()
    assert [json.loads(line)["id"] for line in out.splitlines()] == [1, 2, 3, 4]
    assert "1 error, 3 length" in err and serving.error is None


def test_a_batch_of_any_length_takes_the_same_memory(tiny: Path, tmp_path: Path) -> None:
    """After 1,000 requests a front door keeps as many objects as after 10."""
    kept, made = [], []
    for count in (10, 10, 1000):
        files = tmp_path / f"{len(made)}.in", tmp_path / f"{len(made)}.out"
        files[0].write_text(lines(count))
        gc.collect()
        before = len(gc.get_objects())
        made.append(Serving(tiny, *work(files)))
        made[-1].finish()
        gc.collect()
        kept.append(len(gc.get_objects()) - before)
        assert made[-1].front._answers == count
    assert abs(kept[2] - kept[1]) < 300, kept


def test_a_folder_without_a_tokenizer_serves_token_ids(
    tiny: Path, tmp_path: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_bytes((tiny / "config.json").read_bytes())
    files[0].write_text('{"prompt_token_ids": [5], "max_tokens": 1}\n' + lines(1))
    serving = Serving(tmp_path / "model", *work(files))
    serving.finish()
    good, bad = written(files[1])
    assert good["text"] is None and good["token_ids"] == [9] and good["finish_reason"] == "length"
    assert bad["finish_reason"] == "error" and "give prompt_token_ids" in bad["error"]
    assert "router: this model has neither tokenizer.json nor tiktoken.model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="^--prompt: this model has neither tokenizer.json nor tiktoken.model; "):
        Serving(tmp_path / "model", "--prompt", "x")


@pytest.mark.parametrize("text, failed", [("bad\nworse\n", True), (lines(1) + "bad\n", False), ("\n", False)])
def test_a_batch_fails_if_everything_in_it_does(
    text: str, failed: bool, serve: Callable[..., Serving], files: tuple[Path, Path]
) -> None:
    files[0].write_text(text)
    serving = serve(*work(files))
    serving.finish()
    assert serving.error is None and serving.front.failed is failed


def test_answers_come_while_the_input_is_still_written(serve: Callable[..., Serving], files: tuple[Path, Path]) -> None:
    os.mkfifo(files[0])
    serving = serve(*work(files))
    with files[0].open("w") as writer:
        for count in (1, 5):
            writer.write(lines(count))
            writer.flush()
            assert eventually(lambda count=count: files[1].exists() and len(written(files[1])) >= count)
            assert serving.thread.is_alive()
    serving.finish()
    assert serving.error is None and len(written(files[1])) == 6


def test_ctrl_c_while_lines_are_read_answers_those_that_were_read(
    serve: Callable[..., Serving], files: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    """Resumed, the batch ends as if nothing had happened."""
    count = 30_000
    files[0].write_text(lines(count))
    serving = serve(*work(files))
    assert eventually(lambda: files[1].exists() and len(written(files[1])) >= 20)
    serving.replica.holds.set()
    assert eventually(lambda: serving.front.source.read > 100)
    began = time.monotonic()
    serving.stop.set()
    serving.finish()
    assert time.monotonic() - began < 2 and serving.error is None and not serving.front.failed
    answers = written(files[1])
    read = serving.front.source.read
    assert read == len(answers) < count and [line["id"] for line in answers] == list(range(1, read + 1))
    assert {line.get("error") for line in answers} == {None, "interrupted"}
    assert f"what the input has after line {read} was not read and has no answer" in capsys.readouterr().err
    files[0].write_text("".join(files[0].read_text().splitlines(keepends=True)[:3000]))
    resumed = serve(*work(files), "--existing", "resume")
    resumed.finish()
    assert resumed.error is None and [line["id"] for line in written(files[1])] == list(range(1, 3001))
    assert not any("error" in line for line in written(files[1]))


def test_ctrl_c_ends_a_batch_whose_input_is_silent(serve: Callable[..., Serving], files: tuple[Path, Path]) -> None:
    os.mkfifo(files[0])
    serving = serve(*work(files))
    writer = os.open(files[0], os.O_WRONLY)
    time.sleep(0.2)
    serving.stop.set()
    serving.finish()
    os.close(writer)
    assert serving.error is None and files[1].read_text() == ""


def test_an_input_of_another_format_sends_all_home(serve: Callable[..., Serving], files: tuple[Path, Path]) -> None:
    """Of a pipe it is known only once its first line is there."""
    os.mkfifo(files[0])
    serving = serve(*work(files))
    files[0].write_text(json.dumps({"prompt": "x"}, indent=1))
    serving.finish()
    assert "it is JSON spread over several lines" in str(serving.error)


def test_a_reader_of_stdout_who_leaves_ends_no_batch(
    serve: Callable[..., Serving], files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files[0].write_text(lines(50))
    reader, writer = os.pipe()
    with io.TextIOWrapper(io.FileIO(writer, "w")) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        os.close(reader)
        serving = serve(*work(files))
        serving.finish()
    monkeypatch.undo()
    assert serving.error is None and len(written(files[1])) == 50


def test_a_prompt_that_nobody_reads_is_given_up(serve: Callable[..., Serving], monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with io.TextIOWrapper(io.FileIO(writer, "w")) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        os.close(reader)
        serving = serve("--prompt", "In")
        serving.finish()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
    monkeypatch.undo()
    assert isinstance(serving.error, BrokenPipeError)


@pytest.mark.parametrize(
    "host, access, warns",
    [("127.0.0.1", "", False), ("localhost", "", False), ("0.0.0.0", "--insecure", True), ("0.0.0.0", "secret", False)],
)
def test_the_router_says_where_it_listens_and_who_can_come(
    host: str, access: str, warns: bool, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = ["--secret-file", str(write_secret(tmp_path))] if access == "secret" else access.split()
    args = parse_args(["--model", str(tiny), "--role", "router", "--router", f"{host}:0", "--prompt", "x", *given])
    front = FrontDoor(args, ModelConfig.from_pretrained(tiny), (host, 0))
    front.announce(host)
    front.port.close()
    first, *more = capsys.readouterr().err.splitlines()
    assert first == f"router: listening on {host}:{front.port.port}"
    assert ["anybody who reaches that port can take part" in line for line in more] == [True] * warns


BAD_FLAGS = {
    "--prompt x --existing overwrite": "--existing overwrite is for --output; a --prompt has none",
    "--prompt x --existing resume": "--existing resume is for --output; a --prompt has none",
    "--input i --output - --existing resume": "--existing resume is for a file; --output - is stdout",
    "--input i --output - --existing overwrite": "--existing overwrite is for a file; --output - is stdout",
    "--prompt x --log-interval -1": "--log-interval is -1; it must be 0 or a number of seconds above it",
    "--prompt x --log-interval nan": "--log-interval is nan; it must be 0 or a number of seconds above it",
    "--prompt x --log-interval soon": "argument --log-interval: invalid float value: 'soon'",
    "--role decode --router a:1 --log-interval 5": "--role decode does not take --log-interval",
    "--input i --output o --existing both": "argument --existing: invalid choice: 'both'",
    "--role decode --router a:1 --existing resume": "--role decode does not take --existing",
    "--role prefill --router a:1 --existing overwrite": "--role prefill does not take --existing",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_flags_that_do_not_go_together_are_refused(flags: str) -> None:
    with pytest.raises(ValueError, match=BAD_FLAGS[flags]):
        parse_args(["--model", "m", *flags.split()])


def test_a_refused_batch_does_not_listen(tiny: Path, files: tuple[Path, Path]) -> None:
    """Jobs that wait for the router must not meet one that leaves at once."""
    files[0].write_text(lines(1))
    files[1].write_text("an earlier run's\n")
    args = parse_args(["--model", str(tiny), "--role", "router", "--router", "999.1.1.1:1", *work(files)])
    with pytest.raises(ValueError, match="it exists"):
        FrontDoor(args, ModelConfig.from_pretrained(tiny), ("999.1.1.1", 1))
    assert files[1].read_text() == "an earlier run's\n"


def python(code: str, *closed: str) -> subprocess.Popen:
    command = ["sh", "-c", " ".join(['exec "$0" -c "$1"', *closed]), sys.executable, code]
    return subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, stderr=-1, text=True)


def test_closed_streams_get_no_other_files_number(tmp_path: Path) -> None:
    code = (
        "from disagg.front.streams import secure_streams\n"
        "import os, sys; secure_streams()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); print('lost'); print('lost', file=sys.stderr)\n"
        "os.write(1, b'lost'); os.write(2, b'lost'); file.write('kept'); sys.stdout.flush(); sys.exit(file.fileno())"
    )
    process = python(code, "<&-", ">&-", "2>&-")
    assert process.communicate(timeout=30) == ("", "") and process.returncode >= 3
    assert (tmp_path / "file").read_text() == "kept"


def test_the_limit_of_open_files_is_the_systems() -> None:
    """Many systems allow 1,024 at first, which a hundred links would reach."""
    code = (
        "import resource; from disagg.front.streams import raise_file_limit\n"
        "most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]; resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))\n"
        "raise_file_limit(); print(resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most))\n"
    )
    assert python(code).communicate(timeout=30) == ("True\n", "")


def test_a_reader_of_stderr_who_leaves_ends_nothing() -> None:
    code = (
        "from disagg.front.streams import secure_streams\n"
        "import sys; secure_streams(); print('first', file=sys.stderr); sys.stdin.readline()\n"
        "print('x' * 100_000, file=sys.stderr, flush=True); print('last', file=sys.stderr); print('alive')"
    )
    process = python(code)
    assert process.stderr.readline() == "first\n"
    process.stderr.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.stdout.read() == "alive\n" and process.wait(30) == 0
    process.stdout.close()


def test_every_line_on_stderr_begins_with_the_name() -> None:
    """Lines, parts of lines, long ones, warnings, bars and tracebacks; of any thread, and on stderr alone."""
    code = (
        "from disagg.front.streams import secure_streams\n"
        "import sys, threading, warnings; secure_streams('host rank 3')\n"
        "say = lambda text, end='\\n': print(text, end=end, file=sys.stderr)\n"
        "say('one'); say('two\\nthree'); say('fo', ''); sys.stderr.flush(); say('ur'); say('x' * 20_000)\n"
        "say('a\\rb')\n"
        "warnings.warn('five'); print('out'); thread = threading.Thread(target=lambda: 1 / 0)\n"
        "thread.start(); thread.join(); raise RuntimeError('six')"
    )
    out, err = python(code).communicate(timeout=30)
    lines = re.split("[\r\n]", err.removesuffix("\n"))
    assert out == "out\n" and all(line.startswith("[host rank 3] ") for line in lines), err
    said = [line.removeprefix("[host rank 3] ") for line in lines]
    assert said[:7] == ["one", "two", "three", "four", "x" * 20_000, "a", "b"] and said[-1] == "RuntimeError: six"
    assert sum("five" in line for line in said) == sum("ZeroDivisionError" in line for line in said) == 1, err


@pytest.mark.parametrize("number, said", [(signal.SIGINT, "run.py: interrupted\n"), (signal.SIGTERM, "")])
def test_ctrl_c_before_serving_ends_the_process_at_once(number: int, said: str) -> None:
    code = (
        "from disagg.interrupt import Interrupt; Interrupt(); print('ready', flush=True); import time; time.sleep(60)"
    )
    process = python(code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("", said) and process.returncode == 0


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, "seen"), (signal.SIGTERM, "draining")])
def test_a_signal_while_serving_is_remembered_and_a_second_one_kills(number: int, kind: str) -> None:
    code = (
        "from disagg.interrupt import Interrupt; import time\n"
        "interrupt = Interrupt(); interrupt.hold(); print('ready', flush=True)\n"
        f"while not interrupt.{kind}: time.sleep(0.01)\n"
        f"assert interrupt.seen == ({kind!r} == 'seen')\n"
        "print('seen', flush=True); time.sleep(60)"
    )
    process = python(code)
    for word in ("ready\n", "seen\n"):
        assert process.stdout.readline() == word
        process.send_signal(number)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == 128 + number


def test_a_drain_that_takes_too_long_becomes_an_end_and_a_second_signal_still_kills() -> None:
    code = (
        "import disagg.interrupt as module; import time\n"
        "module.DRAIN_S = 0.3; interrupt = module.Interrupt(); interrupt.hold()\n"
        "interrupt.on_seen(lambda: print('over', flush=True)); print('ready', flush=True)\n"
        "while not interrupt.seen: time.sleep(0.01)\n"
        "assert interrupt.draining; time.sleep(60)"
    )
    process = python(code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "over\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == 128 + signal.SIGTERM
