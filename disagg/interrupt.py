"""Interrupt: what Ctrl-C does, before and while a process serves. Imports only modules that load fast."""

import os
import signal
import sys
import threading
from collections.abc import Callable


class Interrupt:
    """Handles Ctrl-C and SIGTERM.

    Before `hold`, a signal ends the process at once, with status 0. After `hold` it sets `seen`: the loop ends at its
    next step on every rank, and the process exits with status 0. A second signal kills the process.
    """

    def __init__(self) -> None:
        self.seen = self._held = False
        self._listeners: list[Callable[[], None]] = []
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._see)

    def hold(self) -> None:
        """From now on, end only after all requests have an answer."""
        if not self._held:
            self._held = True
            heard, woken = os.pipe()
            os.set_blocking(woken, False)
            signal.set_wakeup_fd(woken)
            threading.Thread(target=self._hear, args=(heard,), name="interrupt", daemon=True).start()

    def on_signal(self, listener: Callable[[], None]) -> None:
        """Call `listener` at the first signal, in a thread of its own. Call it before that signal can be missed."""
        self._listeners.append(listener)

    def _hear(self, heard: int) -> None:
        """Run in a thread: a Python handler cannot run while the main thread is in a collective, perhaps for ever."""
        for count in range(2):
            number = os.read(heard, 1)[0]
            self.seen = True
            if count:
                os._exit(128 + number)
            for listener in self._listeners:
                listener()

    def _see(self, number: int, _: object) -> None:
        if not self._held:
            if number == signal.SIGINT:  # SIGTERM is also what torchrun sends to the other ranks of one that failed
                print("run.py: interrupted", file=sys.stderr, flush=True)
            os._exit(0)  # a module that is being imported could swallow an exception, or print a traceback
