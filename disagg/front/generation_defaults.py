"""The sampling defaults that a checkpoint's `generation_config.json` gives, read as transformers' `generate` does."""

from pathlib import Path
from typing import Any

from disagg.front.rules import RULES
from model.config import read_json

SAMPLING = {  # field -> its value where do_sample is true and the file has none, as in transformers' generate
    "temperature": 1.0,
    "top_p": None,
    "top_k": 50,
    "min_p": None,
    "repetition_penalty": None,
}


def read_defaults(folder: str | Path) -> dict[str, Any]:
    """Return the fields that a request takes if it leaves them out. Without `do_sample: true` there are none: greedy.

    Raises ValueError with the file, the field and the rule.
    """
    path = Path(folder) / "generation_config.json"
    raw = read_json(path) if path.is_file() else {}
    if raw.get("do_sample") is not True:
        return {}
    defaults = {}
    for name, missing in SAMPLING.items():
        value = missing if raw.get(name) is None else raw[name]
        try:
            if value is not None:
                defaults[name] = RULES[name].check(name, value)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return defaults
