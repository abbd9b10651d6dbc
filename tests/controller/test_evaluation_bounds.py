"""What `kvq eval` is given is bounded: counts, and rows from anywhere."""

from __future__ import annotations

import time
from pathlib import Path

import click
import pytest

from kvq.controller.evaluation.cli import _rows_of, parted
from tests.tools.command_line import kvq as kvq_command
from tests.tools.work import bounded_work


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--context", "1"], "a chunk of 1 token"),
        (["--context", "32", "--chunks", "1" + "0" * 30], "--chunks"),
        (["--context", "9" * 5000], "--context takes numbers"),
        (["--context", "1" + "0" * 30], "does not fit"),
    ],
    ids=lambda value: str(value[1][:4] + value[-1][:3]) if isinstance(value, list) else "",
)
def test_counts_that_nothing_can_be_made_of_are_refused_in_one_line(options, words, tiny_bundle, tmp_path):
    (tmp_path / "text").write_text("The old man and the sea. " * 500)
    done = kvq_command("eval", "kld", "-m", tiny_bundle, "--text", tmp_path / "text", *options)
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) < 400


def test_rows_from_anywhere_are_bounded(tmp_path):
    row = {"policy": "int4", "context": 32, "positions": [0, 32], "tokens": 3, "kld_mean": 1.0}
    rows = [row | {"policy": f"p{i}"} for i in range(20_000)]
    with bounded_work():  # each was once compared with all others
        placed, others = parted(rows, "positions")
    assert (len(placed), others) == (20_000, [])
    with bounded_work(clock=time.process_time), pytest.raises(click.ClickException, match="more than 64 MB"):
        _rows_of(Path("/dev/zero"))
