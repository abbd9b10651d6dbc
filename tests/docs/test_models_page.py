"""docs/models.md lists the families that there are, and its bytes are those of the shapes."""

from __future__ import annotations

import re

from kvq.exporter.architectures import ARCHITECTURES
from kvq.runtime.precision.table import Geometry
from tests.tools.families import DEPTH, REAL
from tests.tools.tree import DOCS

PAGE = (DOCS / "models.md").read_text(encoding="utf-8")


def row(name: str) -> str:
    """A model's row."""
    fields = REAL[name]
    head_dim = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    geometry = Geometry(DEPTH[name], fields["num_key_value_heads"], head_dim)
    wide, narrow = 2 * geometry.values, geometry.values * 3.25 / 8
    sizes = f"{wide:,} | {narrow:,.0f} | {wide * 4096 / 1e6:,.0f} MB | {narrow * 4096 / 1e6:,.1f} MB"
    return f"| {name} | {geometry.layers} | {geometry.kv_heads} | {head_dim} | {sizes} |"


def test_bytes_are_those_of_the_shapes() -> None:
    listed = [line for line in PAGE.splitlines() if re.match(r"\| [A-Za-z0-9.-]+ \| \d", line)]
    assert listed == [row(name) for name in REAL]


def test_every_family_is_listed() -> None:
    rows = re.findall(r"^\| [^|]+ \| [^|]+ \| `(\w+)` \| `(\w+)` \|", PAGE, re.M)
    assert {kind for kind, _ in rows} == set(ARCHITECTURES)
    for kind, architecture in rows:
        gguf = ARCHITECTURES[kind].gguf
        assert architecture == (gguf.architecture if gguf else "llama"), kind
