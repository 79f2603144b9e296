"""The pages of docs/ keep up with the code: what they name exists, exercises still apply, words are the code's own."""

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = ("design", "tour", "map", "words")
TEXTS = {page: (ROOT / "docs" / f"{page}.md").read_text() for page in PAGES}
LABELS = ("Question", "Read", "Invariant", "Proof", "Exercise")
EXERCISE = re.compile(r"In `([^`]+)`\s+replace\s+`([^`]+)`\s+with\s+`([^`]+)`")
TEST = re.compile(r"`((?:tests/)?test_\w+\.py)::(\w+)`")
LETTER = re.compile(r"- \*\*([A-Z])\*\*")
TERM = re.compile(r"- \*\*([a-z][^*]*)\*\* \(`([^`]+)`\)")


def quoted(text: str) -> list[str]:
    """What stands in backticks, without fenced code."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def paths(text: str) -> list[str]:
    """The quoted words that are paths of the project, and the targets of links to other files."""
    words = [word.partition("::")[0] for word in quoted(text)]
    tops = {path.name for path in ROOT.iterdir()}
    found = [word for word in words if re.fullmatch(r"[\w./*-]+", word) and word.split("/")[0] in tops]
    found += [word for word in words if re.fullmatch(r"[\w.-]+(/[\w.-]+)*\.(py|md|json|jsonl)", word)]
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    return found + [f"docs/{link}" for link in links if "://" not in link]


@functools.cache
def functions(file: str) -> frozenset[str]:
    """The names of a test file's functions, by its syntax tree."""
    tree = ast.parse((ROOT / file).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def stops() -> list[tuple[str, str]]:
    """(number, text) of each stop of the tour."""
    parts = re.split(r"^## (\d+)\. ", TEXTS["tour"], flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_is_named_exists(page: str) -> None:
    named = paths(TEXTS[page])
    assert len(named) > 20
    assert [path for path in named if not list(ROOT.glob(path))] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_heading_that_is_linked_exists(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([\w.]*)#([^)]+)\)", TEXTS[page]):
        assert anchor in anchors((ROOT / "docs" / (target or f"{page}.md")).read_text()), f"{target}#{anchor}"


@pytest.mark.parametrize("page", ("design", "tour", "map"))
def test_every_test_that_is_named_exists(page: str) -> None:
    named = TEST.findall(TEXTS[page])
    assert len(named) > 20
    assert len(named) == sum(".py::" in word for word in quoted(TEXTS[page])), "a test that cannot be parsed"
    missing = [f"{file}::{name}" for file, name in named if name not in functions(file)]
    assert missing == []


def test_the_map_has_every_file() -> None:
    """Of the product, the scripts and the tests. Files that only mark a package need no row."""
    named = set(paths(TEXTS["map"]))
    wanted = [*ROOT.glob("tests/test_*.py"), ROOT / "run.py"]
    for folder in ("kernels", "model", "parallel", "disagg", "scripts"):
        wanted += (ROOT / folder).rglob("*.py")
    names = [str(path.relative_to(ROOT)) for path in wanted if path.name != "__main__.py" and path.read_text()]
    assert len(names) > 150
    assert [name for name in names if name not in named] == []


def test_the_tour_has_14_stops_with_an_exercise_each() -> None:
    assert [number for number, _ in stops()] == [str(n) for n in range(1, 15)]
    for number, text in stops():
        labels = re.findall(r"^\*\*(\w+)\.\*\* ", text, re.MULTILINE)
        assert labels == list(LABELS), f"stop {number}"
        exercise = text[text.index("**Exercise.**") :]
        assert len(EXERCISE.findall(exercise)) == 1, f"stop {number}: no edit, or several"
        assert re.search(r"it\s+fails\s+(at|after)\s", exercise), f"stop {number}: how does the test fail?"
        assert TEST.search(exercise), f"stop {number}: no test is named"


@pytest.mark.parametrize(("number", "text"), stops(), ids=lambda value: value if value.isdigit() else "")
def test_an_exercise_still_applies(number: str, text: str) -> None:
    """Its words stand in the file once, so that the edit is what was tried."""
    file, old, new = EXERCISE.search(text).groups()
    source = (ROOT / file).read_text()
    assert source.count(old) == 1, f"stop {number}: {file} has {source.count(old)} of {old!r}"
    edited = source.replace(old, new)
    assert edited != source
    ast.parse(edited)


def test_every_letter_is_used_in_the_code() -> None:
    letters = LETTER.findall(TEXTS["words"])
    assert letters == list("TDHCREPLKIBSNVM")
    shapes = re.findall(r"\[[^\]\n]{1,60}\]", code())
    assert [letter for letter in letters if not any(re.search(rf"\b{letter}\b", shape) for shape in shapes)] == []


def test_every_term_is_used_where_it_says() -> None:
    terms = TERM.findall(TEXTS["words"])
    assert len(terms) == len(re.findall(r"^- \*\*[a-z]", TEXTS["words"], re.MULTILINE)), "a term without its file"
    assert len(terms) > 60
    names = [term for term, _ in terms]
    assert names == sorted(names, key=str.lower) and len(set(names)) == len(names)
    missing = []
    for term, file in terms:
        for word in re.split(r" / ", re.sub(r" \(.*\)$| of an expert$", "", term)):
            pattern = re.escape(word).replace(r"\ ", r"[\s_-]").replace(r"\-", r"[\s_-]?")
            if not re.search(rf"(?<![a-z]){pattern}(?![a-rt-z])", (ROOT / file).read_text(), re.IGNORECASE):
                missing.append(f"{word} in {file}")
    assert missing == []


def code() -> str:
    """All source of the product."""
    folders = ("kernels", "model", "parallel", "disagg")
    return "\n".join(path.read_text() for folder in folders for path in sorted(Path(ROOT / folder).rglob("*.py")))
