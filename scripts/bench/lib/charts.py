"""Draw figures as PNG charts. Needs matplotlib, which the extras `charts` and `test` install."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def figure(width: float = 9, height: float = 5) -> tuple[Any, Any]:
    """Return a new figure and its plot, for drawing without a display. Raises ValueError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f'a chart needs matplotlib ({error}): pip install ".[charts]"') from None
    made = Figure((width, height), layout="constrained")
    return made, made.subplots()


def save(made: Any, path: Path, dpi: int = 120) -> None:
    """Write a figure as PNG with 256 colours, which takes less than half the bytes of all colours."""
    from PIL import Image  # of matplotlib's own requirements

    drawn = io.BytesIO()
    made.savefig(drawn, dpi=dpi)
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, "png", optimize=True)


def save_bars(path: Path, title: str, unit: str, series: Mapping[str, Mapping[str, float]]) -> None:
    """Draw horizontal bars: a group per label, the first on top, with one bar for each series that has the label."""
    labels = list(dict.fromkeys(label for values in series.values() for label in values))
    made, plot = figure(9, 1.5 + 0.28 * len(labels) * len(series))
    thick = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        at = [row + i * thick for row, label in enumerate(labels) if label in values]
        shown = [values[label] for label in labels if label in values]
        plot.bar_label(plot.barh(at, shown, thick, label=name), fmt="%.3g", padding=2)
    plot.set_yticks([row + 0.4 - thick / 2 for row in range(len(labels))], labels)
    plot.invert_yaxis()
    plot.margins(x=0.1)
    plot.set_xlabel(unit)
    plot.set_title(title)
    plot.legend()
    save(made, path)


def save_lines(
    path: Path, title: str, x_name: str, y_name: str, series: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    """Draw each series as a line through its points (x, y)."""
    made, plot = figure()
    for name, points in series.items():
        plot.plot(*zip(*points, strict=True), marker="o", label=name)
    plot.set_xlabel(x_name)
    plot.set_ylabel(y_name)
    plot.set_title(title)
    plot.legend()
    save(made, path)


def save_lanes(path: Path, title: str, unit: str, lanes: Mapping[str, Sequence[tuple[float, float, str]]]) -> None:
    """Draw a timeline: a lane per name, the first on top, with its spans (start, end, label).

    All spans of a label have the same colour.
    """
    labels = list(dict.fromkeys(label for spans in lanes.values() for *_, label in spans))
    made, plot = figure(16, 1.5 + 0.5 * len(lanes))
    for i, label in enumerate(labels):
        for row, spans in enumerate(lanes.values()):
            of_label = [(start, end - start) for start, end, name in spans if name == label]
            plot.broken_barh(of_label, (row - 0.4, 0.8), color=f"C{i % 10}", linewidth=0)
        plot.barh(0, 0, color=f"C{i % 10}", label=label)
    plot.set_yticks(range(len(lanes)), lanes)
    plot.invert_yaxis()
    plot.set_xlabel(unit)
    plot.set_title(title)
    plot.legend(loc="upper left", bbox_to_anchor=(1, 1))
    save(made, path)
