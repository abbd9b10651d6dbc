"""The house rules on size: no file of more than 400 lines, no function of more than 60."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.tree import PACKAGES, ROOT, named, parsed, sources

MOST_FILE_LINES = 400
MOST_FUNCTION_LINES = 60
FILES = [*sources(*PACKAGES, "kvq", "tests", kinds=(".py", ".c", ".h")), ROOT / "setup.py"]
# From the line that names a C function at the margin, over its arguments, to the brace that ends it there.
C_FUNCTION = re.compile(r"^\w[^;{}\n]*?(\w+)\([^;{}]*\)\s*\{\n.*?^\}", re.M | re.S)


def functions(path: Path) -> Iterator[tuple[int, str, int]]:
    """First line, name and number of lines of every function in a file, nested ones and methods too."""
    if path.suffix == ".py":
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.lineno, node.name, node.end_lineno - node.lineno + 1
    else:
        text = path.read_text(encoding="utf-8")
        for found in C_FUNCTION.finditer(text):
            yield text.count("\n", 0, found.start()) + 1, found[1], found[0].count("\n") + 1


def test_no_file_has_more_than_400_lines():
    lengths = {named(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    long = {name: length for name, length in lengths.items() if length > MOST_FILE_LINES}
    assert not long, "split by topic: " + ", ".join(f"{name} has {length} lines" for name, length in long.items())


@pytest.mark.slow
def test_no_function_has_more_than_60_lines():
    long = [
        f"{named(path)}:{line} {name} has {length} lines"
        for path in FILES
        for line, name, length in functions(path)
        if length > MOST_FUNCTION_LINES
    ]
    assert not long, "name its steps: " + ", ".join(long)


def test_functions_of_both_languages_are_found(tmp_path):
    """A counter that sees nothing would find nothing too long."""
    python, c = tmp_path / "a.py", tmp_path / "a.h"
    python.write_text(
        "class A:\n    @property\n    def b(\n        self,\n    ):\n        def c():\n            pass\n"
    )
    c.write_text(
        "static int a(int b,\n             int c) {\n    if (b) {\n    }\n}\n\nint d(void);\n\nvoid e(void) {\n}\n"
    )
    assert sorted(functions(python)) == [(3, "b", 5), (6, "c", 2)]
    assert list(functions(c)) == [(1, "a", 5), (9, "e", 2)]
    assert {name for path in FILES if path.suffix in (".c", ".h") for _, name, _ in functions(path)} > {"decode_heads"}
