"""What DeepEP's wheel says of its Python class `Buffer`, as JSON: its signatures and recommended configurations.

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \\
        tokenspeed-deepep==2.0.0.post20260430
    python -m scripts.tools.deepep_wheel tokenspeed_deepep-*.whl > tests/deepep_wheel.json

The wheel's class needs CUDA to be imported. So its syntax tree is read, and the tests hold our calls to the result.
"""

import argparse
import ast
import json
import zipfile
from pathlib import Path
from typing import Any

SOURCE = "deep_ep/buffers/legacy.py"


def read(wheel: Path) -> dict[str, Any]:
    """Return the wheel's name, the signatures of all public methods, and the configurations by number of ranks.

    A signature is a list of parameters: [name], or [name, default]. A configuration is the numbers that follow its SMs.
    Raises ValueError if a default is no literal.
    """
    with zipfile.ZipFile(wheel) as archive:
        tree = ast.parse(archive.read(SOURCE))
    buffer = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Buffer")
    methods = {node.name: node for node in buffer.body if isinstance(node, ast.FunctionDef)}
    shown = [name for name in methods if not name.startswith("_") or name == "__init__"]
    return {
        "wheel": wheel.name,
        "source": SOURCE,
        "signatures": {name: parameters(methods[name].args) for name in shown},
        "dispatch_configs": configurations(methods["get_dispatch_config"]),
        "combine_configs": configurations(methods["get_combine_config"]),
    }


def parameters(args: ast.arguments) -> list[list]:
    names = [[arg.arg] for arg in args.args]
    for name, default in zip(reversed(names), reversed(args.defaults), strict=False):
        name.append(ast.literal_eval(default))
    return names


def configurations(method: ast.FunctionDef) -> dict[str, list[int]]:
    table = next(node for node in ast.walk(method) if isinstance(node, ast.Dict))
    found = {}
    for ranks, config in zip(table.keys, table.values, strict=True):
        assert isinstance(ranks, ast.Constant) and isinstance(config, ast.Call)
        found[str(ranks.value)] = [ast.literal_eval(number) for number in config.args[1:]]
    return found


def as_text(found: dict[str, Any]) -> str:
    """Return JSON with a line per method and number of ranks."""
    parts = []
    for key, value in found.items():
        if isinstance(value, dict):
            lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in value.items())
            parts.append(f" {json.dumps(key)}: {{\n{lines}\n }}")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    print(as_text(read(parser.parse_args().wheel)))


if __name__ == "__main__":
    main()
