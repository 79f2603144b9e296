"""What all tests share: the shipped checkpoint, and one seed."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The checkpoint that the project ships."""
    return ROOT / "model" / "tiny"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
