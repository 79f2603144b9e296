"""A chat template of a model folder: messages in, the prompt's text out.

A template is a program by a stranger, and jinja's sandbox bounds neither its time nor its memory. So it runs in a
process of its own, which the kernel bounds whatever the program does; a list of forbidden operations would always lack
one. A round trip takes 0.2 ms. A template that overruns costs that request its answer; the next one gets a new process.

`disagg/front/template_process.py` is what runs there.
"""

import json
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

PROGRAM = Path(__file__).with_name("template_process.py")
START_S = 60.0  # for Python to start, on a busy machine
RENDER_S = 5.0
MOST_OVERRUNS = 3  # of a template that has never yet worked: then it is not tried any more


class ChatTemplate:
    def __init__(self, source: str, words: dict[str, str], render_s: float = RENDER_S):
        """`words`: what the template may use by name, the special tokens. ValueError if it cannot be compiled."""
        self._template = {"source": source, "words": words}
        self._render_s, self._overruns, self._works, self._ended = render_s, 0, False, True
        self._start()

    def render(self, **given: object) -> str:
        """`given`: what JSON can hold. ValueError if the template refuses it, or takes too much time or memory."""
        if self._overruns >= MOST_OVERRUNS and not self._works:
            raise ValueError(f"it has taken too much time or memory {self._overruns} times, and is not tried any more")
        if self._ended:
            self._start()
        text = self._ask(given)
        self._works = True
        return text

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-P", str(PROGRAM), str(2 * self._render_s)]  # its own limit, should we be gone
        try:
            process = subprocess.Popen(command, stdin=theirs, stdout=theirs, start_new_session=True)  # without Ctrl-C
        except OSError as error:
            raise ValueError(f"its process cannot be started ({error.strerror})") from None
        theirs.close()
        self._end, self._ended = weakref.finalize(self, _end, process, self._socket), False
        self._receive(START_S)
        self._ask(self._template)

    def _ask(self, asked: dict) -> str:
        line = json.dumps(asked).encode() + b"\n"
        answer = self._receive(self._render_s, line)
        if "overrun" in answer:
            self._overruns += 1
            raise ValueError(answer["overrun"])
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def _receive(self, most_s: float, asked: bytes = b"") -> dict:
        """The process's next line. If there is none, it ends, and ValueError says why."""
        deadline, line = time.monotonic() + most_s, bytearray()
        try:
            self._socket.settimeout(most_s)
            self._socket.sendall(asked)
            while not line.endswith(b"\n"):
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))
                if not (piece := self._socket.recv(2**20)):
                    raise ConnectionError("its process has ended")
                line += piece
        except TimeoutError:
            why = f"it takes over {most_s:g} s"
        except OSError as error:
            why = str(error)
        else:
            return json.loads(line)
        self._ended, self._overruns = True, self._overruns + 1
        self._end()
        raise ValueError(why)


def _end(process: subprocess.Popen, connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()
