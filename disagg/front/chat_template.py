"""The chat template of a model folder: turns messages into the prompt's text.

A template is an untrusted program, and jinja's sandbox limits neither its time nor its memory. So it runs in its own
process, which the kernel limits whatever the program does. A list of forbidden operations would never be complete. A
round trip takes 0.2 ms. If a template exceeds a limit, that request fails, and the next one gets a new process.

The process runs `disagg/front/template_process.py`.
"""

import json
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

PROGRAM = Path(__file__).with_name("template_process.py")
START_S = 60.0  # limit for Python to start, on a busy machine
RENDER_S = 5.0
MOST_OVERRUNS = 3  # a template that has never worked is not tried again after this many


class TemplateOverrun(ValueError):
    """A template has taken too much time or memory, or its process has ended."""


class ChatTemplate:
    def __init__(self, sources: dict[str, str], words: dict[str, str], render_s: float = RENDER_S) -> None:
        """Compile the templates of a model.

        `sources`: name -> template. `tool_use` serves requests with tools, if it is there; `default` serves all others.
        `words`: variables for the templates, name -> special token. Raises ValueError if one cannot be compiled.
        """
        self._templates = {"sources": sources, "words": words}
        self._names = set(sources)
        self._render_s, self._overruns, self._works, self._ended = render_s, 0, False, True
        self._start()

    def render(self, given: dict, /) -> str:
        """Render the template with `given`, which must be JSON values.

        Raises ValueError if the template refuses it, and TemplateOverrun if it takes too much time or memory.
        """
        name = "tool_use" if given.get("tools") is not None and "tool_use" in self._names else "default"
        if name not in self._names:
            raise ValueError(f"the model has no template named default, only {', '.join(sorted(self._names))}")
        if self._overruns >= MOST_OVERRUNS and not self._works:
            raise TemplateOverrun(
                f"it has taken too much time or memory {self._overruns} times, and is not tried any more"
            )
        if self._ended:
            self._start()
        text = self._ask({"name": name, "given": given})
        self._works = True
        return text

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        own_limit = str(2 * self._render_s)  # in case this process dies
        command = [sys.executable, "-P", str(PROGRAM), own_limit]
        try:
            process = subprocess.Popen(  # in a new session, which Ctrl-C does not reach
                command, stdin=theirs.fileno(), stdout=theirs.fileno(), start_new_session=True
            )
        except OSError as error:
            raise ValueError(f"its process cannot be started ({error.strerror})") from None
        theirs.close()
        self._end, self._ended = weakref.finalize(self, _end, process, self._socket), False
        self._receive(START_S)
        self._ask(self._templates)

    def _ask(self, asked: dict) -> str:
        line = json.dumps(asked).encode() + b"\n"
        answer = self._receive(self._render_s, line)
        if "overrun" in answer:
            self._overruns += 1
            raise TemplateOverrun(answer["overrun"])
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def _receive(self, most_s: float, asked: bytes = b"") -> dict:
        """Return the process's next answer.

        If none comes within `most_s`, end the process and raise TemplateOverrun.
        """
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
        raise TemplateOverrun(why)


def _end(process: subprocess.Popen, connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()
