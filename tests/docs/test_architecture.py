"""docs/architecture.md draws and lists the floor plan that is kept: each package on its floor, none left out."""

from __future__ import annotations

import re

from tests.house.layers import FLOORS
from tests.tools.tree import DOCS

PAGE = (DOCS / "architecture.md").read_text(encoding="utf-8")


def module(path: str) -> str:
    """Dotted name of a file or folder as the page has it: runtime/kv is kvq.runtime.kv."""
    name = path.removesuffix(".py").replace("/", ".")
    return name if name.partition(".")[0] == "kvq" else f"kvq.{name}"


def test_the_table_lists_every_package_on_its_floor():
    rows = re.findall(r"^\| (\d+) \| (`.*?`) \|", PAGE, re.M)
    listed = {floor: set() for floor in range(len(FLOORS))}
    for floor, packages in rows:
        listed[int(floor)] |= {module(path) for path in re.findall(r"`([^`]+)`", packages)}
    assert listed == {floor: set(packages) for floor, packages in enumerate(FLOORS)}


def test_the_drawing_has_every_floor():
    drawn = re.findall(r"^ +(\d+)   ", PAGE, re.M)
    assert [int(floor) for floor in drawn] == list(reversed(range(len(FLOORS))))
