"""The repository's structure: imports run one way, files and sentences stay short, optional libraries stay optional."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

ORDER = ["kernels", "parallel", "model", "disagg", "run"]  # each may import those before it
OPTIONAL = {  # library -> the only files that may import it, and there inside functions too
    "triton": "kernels/",
    "deep_gemm": "kernels/",
    "flash_mla": "kernels/",
    "flash_attn": "kernels/",
    "deep_ep": "parallel/deepep.py",
    "nixl_cu13": "disagg/handoff/transports/nixl_ucx.py",
    "mooncake": "disagg/handoff/transports/mooncake_tcp.py",
    **dict.fromkeys(("starlette", "uvicorn", "uvloop", "prometheus_client"), "disagg/front/http/"),
    "huggingface_hub": "model/hub.py",  # always installed, but importing it takes half a second
}
LONGEST_SENTENCE = 30  # words
PRODUCT = sorted(p for name in ORDER for p in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/**/*.py")])


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at module level?) of every import in a file."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.append((node.module, id(node) in top))
    return found


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    mine = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module, at_top in imports(path):
        package = module.split(".")[0]
        assert package not in ("scripts", "tests"), f"{path.name} imports {module}"
        if package in ORDER:
            assert ORDER.index(package) <= ORDER.index(mine), f"{mine} must not import {package} ({path.name})"
        home = OPTIONAL.get(package)
        assert home is None or str(path.relative_to(ROOT)).startswith(home), f"{path.name} imports {package}"
        assert at_top or home is not None, f"{path.name} imports {module} inside a function"
    assert "TYPE_CHECKING" not in path.read_text()


ENGINE = ("config", "request", "page_cache", "scheduler", "step", "steps", "engine", "memory", "experts", "rebalance")
WINGS = {  # within disagg/: what may not be imported from there
    "control": ("front", "handoff", *ENGINE[2:]),
    "handoff": ("front", *ENGINE[2:]),
    "front": ("handoff", *ENGINE[2:]),
    **dict.fromkeys(ENGINE, ("control", "front", "handoff")),
    **dict.fromkeys(("role", "unified", "prefill", "decode", "pipeline", "connection", "loop", "reports"), ("front",)),
}


@pytest.mark.parametrize("path", [p for p in PRODUCT if p.is_relative_to(ROOT / "disagg")], ids=str)
def test_the_wings_of_disagg_are_apart(path: Path) -> None:
    """The engine knows no router and no link; the front door and the handoff know no engine, and not one another."""
    wing = path.relative_to(ROOT / "disagg").parts[0].removesuffix(".py")
    for module, _ in imports(path):
        if module.startswith("disagg."):
            other = module.split(".")[1]
            assert other not in WINGS.get(wing, ()), f"disagg/{wing} must not import {module} ({path.name})"


def test_no_module_cycles() -> None:
    graph = {}
    for path in PRODUCT:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[name] = {module for module, _ in imports(path)}
    done, active = set(), []

    def visit(name: str) -> None:
        assert name not in active, f"a cycle: {' -> '.join([*active[active.index(name) :], name])}"
        if name in done or name not in graph:
            return
        active.append(name)
        for module in graph[name]:
            visit(module)
        active.pop()
        done.add(name)

    for name in graph:
        visit(name)
    assert len(done) == len(PRODUCT)


def test_files_stay_small() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in PRODUCT}
    assert {name: size for name, size in sizes.items() if size > 400} == {}


def test_every_package_has_a_docstring() -> None:
    """So does every module."""
    assert [str(p) for p in PRODUCT if not ast.get_docstring(ast.parse(p.read_text()))] == []


def sentences(text: str) -> list[str]:
    """Of a docstring's prose: drawings, tables and code, which are indented or in columns, are none."""
    found, paragraph = [], ""
    for line in [*inspect.cleandoc(text).splitlines(), ""]:
        if line.strip() and not re.search(r"^[ |>]|\S {2,}\S", line):
            paragraph += f" {line.strip()}"
            continue
        found += re.split(r"(?<=[.!?])\s+", paragraph.strip())
        paragraph = ""
    return [sentence for sentence in found if sentence]


def test_sentences_stay_short() -> None:
    """A longer sentence needs a second reading."""
    long = []
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for sentence in sentences(ast.get_docstring(node) or ""):
                    if len(re.findall(r"[A-Za-z][\w'/-]*", sentence)) > LONGEST_SENTENCE:
                        long.append(f"{path.relative_to(ROOT)}: {sentence}")
    assert long == []


def test_the_cpu_path_imports_no_gpu_library() -> None:
    code = f"import sys; sys.argv = ['run.py']; import run; print(sorted(set({list(OPTIONAL)}) & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_the_repository_stays_small() -> None:
    """The shipped checkpoint aside, which has 9.5 MB."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    files = [ROOT / name for name in listed.decode().split("\0") if name]
    sizes = [path.stat().st_size for path in files if path.exists() and path.suffix != ".safetensors"]
    assert sum(sizes) < 5_000_000


def test_functions_around_kernels_are_annotated() -> None:
    """Ruff looks away from kernels/ (pyproject.toml), because a Triton kernel's arguments have no Python types."""
    bare = []
    for path in ROOT.glob("kernels/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "jit" not in " ".join(map(ast.unparse, node.decorator_list)):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                typed = all(one.annotation or one.arg in ("self", "cls") for one in given) and node.returns
                bare += [] if typed else [f"{path.name}: {node.name}"]
    assert bare == []
