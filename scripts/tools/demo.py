"""Serve prompts with separate prefill and decode jobs on this machine, then with one process, and compare the tokens.

`scripts/demo [FILE]` runs this. FILE has other prompts, in the format of `--input`. It starts the commands that a user
would type, and prints them. It shows each text as soon as it is finished, then the router's table.
"""

import json
import random
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from disagg.control.address import answers

ROOT = Path(__file__).parents[2]
PROMPTS = "docs/prompts.jsonl"
MODEL = "model/tiny"
RANKS = 2  # on each side


def free_port() -> int:
    """Return a free port below the ephemeral range, so that no other process gets it before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def start(*command: str, quiet: bool = False) -> subprocess.Popen:
    """Start a process of run.py. `quiet`: without output and in a session of its own, which Ctrl-C does not reach.

    Ctrl-C reaches the router alone, and the router then ends the jobs.
    """
    print("$ " + shlex.join(["torchrun" if "torch.distributed.run" in command else "python", *_visible(command)]))
    output = subprocess.DEVNULL if quiet else None
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=output, stderr=output, start_new_session=quiet)


def _visible(command: tuple[str, ...]) -> list[str]:
    return [word for word in command if word not in ("-m", "torch.distributed.run")]


def read_tokens(path: Path) -> dict[str, list[int]]:
    return {answer["id"]: answer["token_ids"] for answer in map(json.loads, path.read_text().splitlines())}


def show_texts(path: Path, router: subprocess.Popen) -> None:
    """Print each answer as the router writes it, until the router has ended."""
    shown = 0
    while True:
        ended = router.poll() is not None
        text = path.read_text() if path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()  # the last line may be half written
        for answer in map(json.loads, lines[shown:]):
            print(f"--- {answer['id']}: {answer['text']}\n", flush=True)
        if ended:
            return
        shown = len(lines)
        time.sleep(0.1)


def main(prompts: str = PROMPTS) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        apart, together = Path(scratch, "disaggregated.jsonl"), Path(scratch, "unified.jsonl")
        host, port = "127.0.0.1", free_port()
        address = f"{host}:{port}"
        torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "run.py")
        flags = ("--router", address, "--model", MODEL)
        router = start("run.py", "--role", "router", *flags, "--input", prompts, "--output", str(apart))
        jobs = [router]
        try:
            # Without the router, the jobs would wait for another one. And a torchrun that is ended while it starts its
            # ranks may leave them behind.
            while router.poll() is None and not answers(host, port):
                time.sleep(0.1)
            if router.poll() is None:
                jobs += [start(*torchrun, "--role", role, *flags, quiet=True) for role in ("prefill", "decode")]
            show_texts(apart, router)
            failed = next((job.args for job in jobs if job.wait(timeout=300)), None)
        except KeyboardInterrupt:  # the router got it too, and ends the jobs
            for job in jobs:
                job.wait(timeout=60)
            return 0
        finally:
            for job in jobs:
                if job.poll() is None:
                    job.terminate()  # torchrun then ends its ranks
        if failed is not None:
            print("failed:", shlex.join(failed))
            return 1

        print("\nThe same requests in one unified process:", flush=True)
        one = start("run.py", "--model", MODEL, "--input", prompts, "--output", str(together))
        if one.wait(timeout=300):
            return 1
        different = [id for id, tokens in read_tokens(together).items() if read_tokens(apart)[id] != tokens]
        if different:
            print(f"\nDIFFERENT tokens for: {', '.join(different)}")
            return 1
        count = sum(map(len, read_tokens(apart).values()))
        print(f"\nAll {count} tokens of {RANKS} prefill + {RANKS} decode ranks equal those of one process.")
        return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
