"""Rows of a measurement as JSON and as tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np

from kvq.runtime.files import write_atomically

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]  # heading -> a row's cell


class Results:
    """Rows as they are measured: each a line of a Markdown table on stdout, all of them in a JSON file.

    Args:
        columns: of the table.
        file: to write, None for none.
    """

    def __init__(self, columns: Columns, file: Path | None = None) -> None:
        self.rows: list[Row] = []
        self._columns, self._file = columns, file
        click.echo("\n".join(markdown(columns, [])))

    def add(self, row: Row) -> None:
        """Show a row and keep it."""
        self.rows.append(row)
        click.echo(markdown(self._columns, [row])[2])
        write_json(self.rows, self._file)


def write_json(value: Any, file: Path | None) -> None:
    """Write JSON, atomically; None: nowhere."""
    if file is not None:
        write_atomically(file, json.dumps(value, indent=1) + "\n")


def markdown(columns: Columns, rows: Iterable[Row]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [columns.keys(), *([show(row) for show in columns.values()] for row in rows)]
    head, *body = ["| " + " | ".join(cells) + " |" for cells in lines]
    return [head, "|" + "---|" * len(columns), *body]


def aligned(columns: Columns, rows: Iterable[Row]) -> list[str]:
    """Lines of a table for a terminal: first and last column to the left, the others to the right."""
    lines = [list(columns), *([show(row) for show in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ways = ["<", *">" * (len(widths) - 2), "<"]
    return ["  ".join(f"{c:{way}{w}}" for c, way, w in zip(line, ways, widths, strict=True)).rstrip() for line in lines]


def number(key: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    """A cell that is a scaled number; empty where the row has none."""
    return lambda row: format(scale * row[key], form) if key in row else ""


def quarters(values: Any) -> list[float]:
    """25th percentile, median, 75th percentile."""
    return np.percentile(values, [25, 50, 75]).tolist()


def quartiles(values: Any, form: str) -> str:
    """Median, and in brackets 25th and 75th percentile where there is more than one value."""
    low, median, high = (format(x, form) for x in quarters(values))
    return f"{median} ({low} - {high})" if len(values) > 1 else median
