"""The store of the project's figures, docs/measurements.json, as rows."""

import json
from pathlib import Path
from typing import Any

STORE = Path(__file__).parents[3] / "docs" / "measurements.json"


def rows(path: Path = STORE) -> list[dict[str, Any]]:
    """Read a file of measurements, one row each; none if it does not exist. Raises ValueError if it holds none."""
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not a benchmark's records ({error})") from None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{path}: not a benchmark's records (they are a list of objects)")
    return found
