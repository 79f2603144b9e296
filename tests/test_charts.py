"""Charts are PNG files, and not blank."""

from pathlib import Path

from matplotlib.image import imread

from scripts.bench.lib.charts import save_bars, save_lines


def test_bars_and_lines(tmp_path: Path) -> None:
    bars, lines = tmp_path / "bars.png", tmp_path / "lines.png"
    save_bars(bars, "parts", "ms", {"measured": {"experts": 0.2, "attention": 0.3}, "floor": {"attention": 0.25}})
    save_lines(lines, "balance", "ranks", "mean / fullest", {"static": [(4, 0.9), (12, 0.8)], "none": [(4, 0.5)]})
    for path in (bars, lines):
        image = imread(path)
        assert image.shape[0] > 100 and image.shape[1] > 500 and image.std() > 0.01
