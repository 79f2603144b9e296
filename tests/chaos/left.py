"""What processes have left behind: processes of their sessions, listening sockets, shared memory. Linux only."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

SHARED = Path("/dev/shm")
LISTENS = "0A"  # of /proc/net/tcp


def alive(sessions: Iterable[int]) -> list[int]:
    """Return the processes of these sessions that have not ended."""
    wanted, found = set(sessions), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, session, *_ = (folder / "stat").read_text().rsplit(") ", 1)[1].split()
            if int(session) in wanted and state != "Z":
                found.append(int(folder.name))
    return found


def listeners() -> set[tuple[int, str]]:
    """Return all sockets of this machine that listen, as (port, inode)."""
    found = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == LISTENS:
                    found.add((int(words[1].rsplit(":", 1)[1], 16), words[9]))
    return found


def listeners_of(pids: Iterable[int]) -> set[tuple[int, str]]:
    """Return the sockets where these processes listen."""
    inodes = set()
    for pid in pids:
        with suppress(OSError):
            for number in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    inodes.add(os.readlink(f"/proc/{pid}/fd/{number}").removeprefix("socket:[").removesuffix("]"))
    return {(port, inode) for port, inode in listeners() if inode in inodes}


def shared_memory() -> set[str]:
    """Return the names of all shared memory, apart from locks of processes that the tests' fork server has started.

    Those keep the names of Python's locks, for others to find. Elsewhere such a lock loses its name when it is made.
    """
    return {name for name in os.listdir(SHARED) if not name.startswith("sem.mp-")} if SHARED.exists() else set()


def orphans(names: Iterable[str]) -> list[str]:
    """Return those pieces of shared memory that no process has mapped or open."""
    used = ""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            used += (folder / "maps").read_text()
            used += "\n".join(os.readlink(fd) for fd in (folder / "fd").iterdir())
    return [name for name in names if (SHARED / name).exists() and f"{SHARED / name}" not in used]
