"""The README and docs/*.md tell the truth where a test can see it: figures, links, paths, flags and sizes."""

import re
import subprocess
from itertools import chain
from pathlib import Path

import pytest

from run import ROLES, parse_args
from scripts.bench.lib.measurements import Measurement, load
from scripts.tools.plan.__main__ import parse_args as plan_args
from scripts.tools.results_chart import SHOWN
from scripts.tools.top import parse_args as top_args
from tests.conftest import ROOT

README, USAGE, RESULTS = ROOT / "README.md", ROOT / "docs" / "usage.md", ROOT / "docs" / "results.md"
RENDERED = ROOT / "docs" / "measurements.md"  # its commands have the names that scripts had when they were run
PAGES = [ROOT / "CONTRIBUTING.md", README, *sorted(p for p in (ROOT / "docs").glob("*.md") if p != RENDERED)]
FOLDERS = ("kernels", "parallel", "model", "disagg", "scripts", "tests", "docs")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def figures(text: str) -> list[dict[str, str]]:
    """The rows of every table that has the columns `record` and `value`, by column."""
    rows, columns = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            columns = None
        elif columns is None:
            columns = cells
        elif {"record", "value"} <= set(columns) and set("".join(cells)) - set("- "):
            rows.append(dict(zip(columns, cells, strict=True)))
    return rows


def shown(value: float | None, like: str) -> str:
    """The value with as many decimals as `like` has."""
    return "" if value is None else f"{value:,.{len(like.partition('.')[2])}f}"


def differences(rows: list[dict[str, str]], records: dict[str, Measurement]) -> list[str]:
    """One line for each cell that is not what its record says."""
    found = []
    for row in rows:
        record = records.get(row["record"])
        if record is None:
            found.append(f"no record {row['record']!r}")
            continue
        said = {column: getattr(record, column) for column in ("unit", "kind", "machine", "commit")}
        said |= {column: shown(getattr(record, column), row[column]) for column in ("value", "reference")}
        found += [f"{record.name}: {column} is {row[column]!r}, not {text!r}"
                  for column, text in said.items() if row[column] != text]  # fmt: skip
    return found


def words(text: str) -> set[str]:
    """Everything in backquotes or in a code block, split at white space."""
    blocks = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return set(" ".join([*blocks, *re.findall(r"`([^`]+)`", rest)]).split())


def paths(text: str) -> set[str]:
    """The files of this repository that a page names."""
    begin = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*\.[a-z]+|run\.py|pyproject\.toml|constraints\.txt")
    return {word.strip("()[],;:.") for word in words(text) if begin.fullmatch(word.strip("()[],;:."))}


def links(text: str) -> set[str]:
    """The relative targets of a page's links and pictures, without their anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return {target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)}


def flags_of_run(capsys: pytest.CaptureFixture) -> dict[str, set[str]]:
    """Role -> its flags, as --help lists them."""
    found = {}
    for role in ROLES:
        with pytest.raises(SystemExit):
            parse_args(["--role", role, "--help"])
        found[role] = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    return found


def commands(text: str) -> list[str]:
    """Each line of a code block that starts run.py; lines that end in a backslash go on."""
    blocks = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
    lines = chain.from_iterable(block.replace("\\\n", " ").splitlines() for block in blocks)
    return [line for line in lines if re.search(r"\brun\.py\s", line) and not line.lstrip().startswith("run.py:")]


def test_the_figures_are_those_of_the_records() -> None:
    rows = figures(RESULTS.read_text())
    assert len(rows) >= 10
    assert differences(rows, {record.name: record for record in load()}) == []


def test_the_chart_shows_figures_of_the_page() -> None:
    rows = {row["record"]: row for row in figures(RESULTS.read_text())}
    assert set(SHOWN) <= set(rows) and all(rows[name]["reference"] for name in SHOWN)


def test_a_wrong_figure_is_seen() -> None:
    """Each column of a row, a name that does not exist, and a digit more."""
    records = {record.name: record for record in load()}
    row = figures(RESULTS.read_text())[0]
    for column in ("value", "unit", "reference", "kind", "machine", "commit", "record"):
        assert len(differences([row | {column: "1.5"}], records)) == 1, column
    assert differences([row | {"value": row["value"] + ".0"}], records)
    assert differences([row], records) == []


def test_the_readme_is_short() -> None:
    assert len(README.read_bytes()) <= 8000


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    assert sorted(link for link in links(text) if not (page.parent / link).exists()) == []
    assert (
        sorted(name for name in paths(text) if not (ROOT / name).exists() and not (page.parent / name).exists()) == []
    )


def test_a_name_that_does_not_exist_is_seen() -> None:
    text = (
        "[a](docs/none.md) ![b](c.png#d) [e](https://f) `model/none.py`, `go x/y.py`\n```\npython scripts/no.py\n```\n"
    )
    assert links(text) == {"docs/none.md", "c.png"}
    assert paths(text) == {"model/none.py", "scripts/no.py"}


def test_usage_has_every_flag_and_no_other(capsys: pytest.CaptureFixture) -> None:
    """In its tables each flag stands once, with the roles that take it."""
    roles = flags_of_run(capsys)
    wanted = {flag: {role for role in ROLES if flag in roles[role]} for flag in set().union(*roles.values())}
    rows = re.findall(r"^\| `(--[a-z-]+)[^|]*\| ([^|]+) \|", USAGE.read_text(), re.MULTILINE)
    listed = {flag: set(ROLES) if names == "all" else set(names.split(", ")) for flag, names in rows}
    assert listed == wanted and len(rows) == len(listed)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_takes_its_flags(page: Path, capsys: pytest.CaptureFixture) -> None:
    """Flags of run.py in a page's code blocks are flags of the role that the command starts."""
    roles = flags_of_run(capsys)
    for command in commands(page.read_text()):
        given = command.partition("run.py ")[2]
        role = re.search(r"--role (\w+)", given)
        taken = roles[role[1]] if role and role[1] in roles else roles["unified"]
        unknown = set(FLAG.findall(given)) - taken - {"--help"}
        assert not unknown, f"{page.name}: {command}"


def test_prose_of_usage_names_flags_that_exist(capsys: pytest.CaptureFixture) -> None:
    """torchrun's own flags stand before run.py. scripts/plan and scripts/top have sections, and three tools one."""
    known = set().union(*flags_of_run(capsys).values()) | {"--help"}
    others = {}
    for section, parse in {"Planning": plan_args, "Metrics": top_args}.items():
        with pytest.raises(SystemExit):
            parse(["--help"])
        others[section] = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)) - known
    torchrun = {"--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"}
    tools = {"--profile", "--constraint", "--tokenizer", "--data", "--disable-progress", "--tasks", "--include"}
    tools |= {"--phases", "--exclude-checks", "--seed", "--continue-on-failure", "--no-shrink"}
    launch = set(FLAG.findall((ROOT / "scripts" / "launch" / "ssh").read_text())) & {"--dry-run"}
    known_here = known | torchrun | tools | launch | set().union(*others.values())
    assert set(FLAG.findall(USAGE.read_text())) - known_here == set()
    for section, flags in others.items():
        text = USAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
        assert flags <= set(FLAG.findall(text)), f"a flag is missing in {section}"


def test_scripts_start() -> None:
    """The commands of the README that are files can be executed."""
    for name in ("scripts/demo", "scripts/plan", "scripts/test", "scripts/setup", "scripts/top"):
        mode = subprocess.run(["git", "ls-files", "-s", name], cwd=ROOT, capture_output=True, text=True).stdout
        assert mode.startswith("100755"), name
