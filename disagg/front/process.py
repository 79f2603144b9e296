"""The router's process in a unified job: beside the engine, Python's lock would make each wait for the other.

Rank 0 forks it before torch has threads of groups or a GPU. The two talk through a pipe:

    rank 0 --> the model's folder, the host to listen at
    rank 0 <-- the port, or the error that refuses the user's flags or files
    rank 0 --> the number of replicas, when all ranks are ready: now requests are served
    rank 0 --> the user wants to end early, or the job has ended

The router ends early, too, when the pipe does, because rank 0 has died.
"""

import contextlib
import os
import signal
import sys
import threading
from argparse import Namespace
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from disagg.front.exit_status import exit_status
from disagg.front.front_door import FrontDoor
from disagg.interrupt import Interrupt
from model.config import ModelConfig

STATUSES = (0, 1, 2)  # of a router that came to its own end, and has sent Finish to the replicas


class RouterProcess:
    """Rank 0's handle of the process."""

    def __init__(self, args: Namespace) -> None:
        """Fork. Call it before `Mesh.create` starts threads, because a child has none of its parent's.

        Numpy has started some already, but the router does not need them.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        self._pipe, theirs = Pipe()
        self._pid = os.fork()
        if self._pid == 0:
            self._pipe.close()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # rank 0 gets them too, and says so
            status = exit_status(lambda: _serve(theirs, args))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        theirs.close()
        self._status, self._host = 0, ""
        self._watch: threading.Thread | None = None  # from `start` on

    def open(self, model: str, host: str) -> None:
        """Have the front door opened. Reading a tokenizer may take a second: do something else meanwhile."""
        self._host = host
        with contextlib.suppress(OSError):  # it has ended, which `address` says
            self._pipe.send((model, host))

    def address(self) -> tuple[str, int]:
        """Wait until the front door is open. Returns the router's address. Raises ValueError with what it refuses."""
        try:
            port, error = self._pipe.recv()
        except (EOFError, OSError):
            raise ValueError("the router's process has ended") from None
        if error is not None:
            raise ValueError(error)
        return self._host, port

    def abandon(self) -> None:
        """End the process, if it does not serve yet. Otherwise it ends by itself."""
        if self._watch is None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)

    def start(self, replicas: int, interrupt: Interrupt) -> None:
        """Serve requests. A router that is killed ends the job, as Ctrl-C would."""
        self._tell(replicas)
        interrupt.on_seen(lambda: self._tell(None))
        self._watch = threading.Thread(target=self._wait, args=(interrupt,), name="router")
        self._watch.start()

    def join(self) -> int:
        """Wait until the router has ended, now that the job has. Returns its exit status."""
        assert self._watch is not None
        self._tell(None)  # another rank may have been interrupted alone
        self._watch.join()
        return self._status

    def _tell(self, message: int | None) -> None:
        with contextlib.suppress(OSError):  # it has ended, which `_wait` sees
            self._pipe.send(message)

    def _wait(self, interrupt: Interrupt) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        if status not in STATUSES:
            print(f"unified: the router's process has ended with status {status}", file=sys.stderr, flush=True)
            self._status, interrupt.seen = 1, True
        else:
            self._status = status


def _serve(pipe: Connection, args: Namespace) -> int:
    """Run the router in its process. Returns the exit status."""
    stop = threading.Event()

    def hear() -> None:
        try:
            pipe.recv()
        except (EOFError, OSError):  # rank 0 has died: the router ends what it has
            stop.set()
            return
        stop.set()
        with contextlib.suppress(EOFError, OSError):
            while True:
                pipe.recv()  # it may say so more than once
        os._exit(1)  # rank 0 has died while the router was ending

    try:
        args.model, host = pipe.recv()
        try:
            front = FrontDoor(args, ModelConfig.from_pretrained(args.model), (host, 0))
        except (ValueError, OSError) as error:
            pipe.send((None, str(error)))
            return 2
        pipe.send((front.port.port, None))
        replicas = pipe.recv()
    except (EOFError, OSError):  # rank 0 has ended before it served
        return 0
    threading.Thread(target=hear, name="pipe", daemon=True).start()
    front.run(stop.is_set, replicas)
    return 1 if front.failed else 0
