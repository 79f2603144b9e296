"""Fixtures of all tests: the shipped checkpoint, and a seed."""

import json
import random
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)  # as in run.py on a CPU, because threads on busy cores wait for each other

_contexts: list[zmq.Context] = []


def keep_contexts() -> None:
    """Keep each ZeroMQ context that is not closed.

    What a failed test left open would otherwise end when it is collected, in another test, and wait there for ever.
    """
    make = zmq.Context.__init__

    def made(self: zmq.Context, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        _contexts[:] = [context for context in _contexts if not context.closed]
        _contexts.append(self)

    zmq.Context.__init__ = made


keep_contexts()


def eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Wait for the condition. Return whether it became true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def write_secret(folder: Path, text: str = "0123456789abcdef" * 2 + "\n") -> Path:
    """Write a file for --secret-file."""
    folder.mkdir(exist_ok=True)
    path = folder / "secret"
    path.write_text(text)
    path.chmod(0o600)
    return path


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


# The files that take the longest, in this order. They come first, so that two workers end at about the same time.
LONGEST = ("chaos", "speculation", "faults", "hosts", "prefix_cache", "torchrun", "rebalance", "worlds", "cli")
LONGEST += ("prompt_graphs", "speculation_apart", "acceptance", "scheduler", "model", "family", "handoff")
LONGEST += ("bench_speculation", "bench_rank", "speculation_graphs", "mtp", "pipeline", "transports", "bench_handoff")
LONGEST += ("bench_ranks", "drain", "dummy", "dispatch", "hostile_ports", "router", "chat_template", "overlap", "hub")
LONGEST += ("memory", "chosen_experts", "peer", "secret", "bench_prefix", "roles")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The checkpoint that the project ships."""
    return ROOT / "model" / "tiny"


@pytest.fixture(scope="session")
def small(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint's first layers, one dense and two with experts: small enough for worlds of many ranks."""
    folder = tmp_path_factory.mktemp("small") / "model"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not re.match(r"model\.layers\.([3-9])\.", name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Seed torch: with 0 on a CPU, on a GPU with a random seed, which a failing test shows."""
    seed = random.SystemRandom().randrange(2**32) if request.node.get_closest_marker("gpu") else 0
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


@pytest.fixture
def opened() -> Iterator[Callable[[Any], Any]]:
    """opened(thing) closes it at the end."""
    things: list[Any] = []

    def keep(thing: Any) -> Any:
        things.append(thing)
        return thing

    yield keep
    for thing in things:
        thing.close()
