"""Interrupt: what Ctrl-C does, before a process serves and after. Imports nothing that takes time."""

import os
import signal
import sys
import threading


class Interrupt:
    """Ctrl-C or SIGTERM. Before `hold` it ends the process at once, with status 0. After `hold` it is remembered: the
    loop ends at its next step on every rank, and the process with status 0. A second one kills."""

    def __init__(self) -> None:
        self.seen = self._held = False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._see)

    def hold(self) -> None:
        """There are requests from here on, which want an answer first."""
        if not self._held:
            self._held = True
            heard, woken = os.pipe()
            os.set_blocking(woken, False)
            signal.set_wakeup_fd(woken)
            threading.Thread(target=self._hear, args=(heard,), name="interrupt", daemon=True).start()

    def _hear(self, heard: int) -> None:
        """In a thread: a handler has to wait while the main thread is in a collective, perhaps for a frozen rank."""
        for count in range(2):
            number = os.read(heard, 1)[0]
            self.seen = True
            if count:
                os._exit(128 + number)

    def _see(self, number: int, _: object) -> None:
        if not self._held:
            if number == signal.SIGINT:  # SIGTERM is also what torchrun sends to the other ranks of one that failed
                print("run.py: interrupted", file=sys.stderr, flush=True)
            os._exit(0)  # an exception could be lost, or become a traceback, in whatever is being imported
