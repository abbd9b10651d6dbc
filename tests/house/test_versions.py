"""The versions that are tested as the lowest: every dependency names one, and none is newer than the tested one."""

from __future__ import annotations

import re

from tests.tools.tree import ROOT
from tests.tools.versions import lowest, requirements


def numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def test_every_dependency_has_a_lowest_version_up_to_the_tested_one():
    tested = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    found = {name: lowest(bounds).removeprefix("==") for name, bounds in requirements().items()}
    assert {"numpy", "onnxruntime", "tokenizers", "onnx", "llguidance", "starlette"} <= found.keys()
    assert [name for name in found if name in tested and numbers(found[name]) > numbers(tested[name])] == []
