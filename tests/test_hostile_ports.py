"""Forged and random bytes at every port of every role change no answer, end no process and fill no memory.

Here few of them; `python -m tests.hostile_ports 10000` sends many.
"""

import sys
from pathlib import Path

import pytest

from tests.hostile_ports import attack, check, one_process


@pytest.fixture(scope="module")
def expected(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return one_process(tiny, tmp_path_factory.mktemp("alone"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it finds the ports in /proc")
@pytest.mark.parametrize("secret", (False, True), ids=("without a secret", "with one"))
def test_strangers_change_nothing(secret: bool, tiny: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    figures = attack(tiny, tmp_path, secret, count=600, idle=20, frame=2**26, expected=expected, torchs=60)
    assert [len(figures.ports[role]) for role in ("router", "prefill", "decode")] == [2, 2, 0]  # HTTP; door and link
    assert [len(figures.torchs[role]) for role in ("router", "prefill", "decode")] == [0, 2, 1]  # the store, and gloo
    check(figures, grown=40, flat=3)
    kind = "a connection was refused" if secret else "a message that is no knock was refused"
    assert any(kind in line for line in figures.lines["prefill"])
