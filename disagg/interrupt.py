"""Interrupt: what Ctrl-C and SIGTERM do, before and while a process serves. Imports only modules that load fast."""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable

DRAIN_S = 600.0  # how long a process that got SIGTERM may finish what runs


class Interrupt:
    """Handles Ctrl-C and SIGTERM.

    Before `hold`, a signal ends the process at once, with status 0. After `hold`, Ctrl-C sets `seen`: the loop ends at
    its next step on every rank, and the process exits with status 0. SIGTERM sets `draining`: what runs is finished,
    and nothing new is begun. After DRAIN_S it sets `seen` too. A second signal kills the process.

    SIGTERM is also what torchrun sends to the other ranks of one that failed. They then wait in a collective, which
    fails with the connection to that rank, or after `COLLECTIVE_S`. Torchrun kills them after 30 s.
    """

    def __init__(self) -> None:
        self.seen = self.draining = self._held = False
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

    def on_seen(self, listener: Callable[[], None]) -> None:
        """Call `listener` when `seen` is set, in a thread of its own. Call this before that can be missed."""
        self._listeners.append(listener)

    def _hear(self, heard: int) -> None:
        """Run in a thread: a Python handler cannot run while the main thread is in a collective, perhaps for ever."""
        again = False
        if os.read(heard, 1)[0] == signal.SIGTERM:
            self.draining = True
            again = bool(select.select([heard], [], [], DRAIN_S)[0])
        if not again:
            self.seen = True
            for listener in self._listeners:
                listener()
        os._exit(128 + os.read(heard, 1)[0])

    def _see(self, number: int, _: object) -> None:
        if not self._held:
            if number == signal.SIGINT:  # SIGTERM is also what torchrun sends to the other ranks of one that failed
                print("run.py: interrupted", file=sys.stderr, flush=True)
            os._exit(0)  # a module that is being imported could swallow an exception, or print a traceback
