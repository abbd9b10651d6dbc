"""Plots of results: nothing in them is told by colour alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from kvq.bench.report.plot import write_plot
from kvq.controller.evaluation.report import ORDER, STYLES, plot

DOCS = Path(__file__).resolve().parents[2] / "docs"


def rows(pattern: str) -> list[dict]:
    """Rows of all JSON files of measurements that match."""
    return [row for file in sorted(DOCS.glob(pattern)) for row in json.loads(file.read_text())]


@pytest.mark.parametrize(
    ("draw", "pattern"), [(write_plot, "performance/smollm-135m.json"), (plot, "quality/pareto-*.json")]
)
def test_a_plot_is_grey(draw, pattern, tmp_path):
    draw(rows(pattern), tmp_path / "plot.png")
    pixels = image.imread(tmp_path / "plot.png")
    assert np.ptp(pixels[..., :3], axis=2).max() == 0
    assert pixels.min() < 0.1


def test_arms_differ_in_their_markers():
    drawn = [
        arm for arm in ORDER if arm in {row["arm"] for row in rows("quality/pareto-*.json") if row["bits_requested"]}
    ]
    assert drawn
    assert len({STYLES[arm][0] for arm in drawn}) == len(drawn)


def test_committed_pictures_are_grey():
    for file in ("quality/pareto.png", "smollm-135m.png", "../models/curve.png"):
        assert np.ptp(image.imread(DOCS / file)[..., :3], axis=2).max() == 0, file
