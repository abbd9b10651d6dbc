"""The examples of docs/adding.md, which tests follow to the letter."""

from __future__ import annotations

import re
from pathlib import Path

from tests.tools.tree import DOCS

# A fenced block whose first line names the file it goes to, as a comment.
BLOCK = re.compile(
    r"^```(?P<kind>python|c|diff)\n(?:# |/\* )(?P<file>[\w./]+)(?: \*/)?\n(?P<text>.*?)^```$", re.M | re.S
)


def _blocks(*kinds: str) -> dict[str, str]:
    """File -> text of the blocks of these kinds."""
    page = (DOCS / "adding.md").read_text(encoding="utf-8")
    return {found["file"]: found["text"] for found in BLOCK.finditer(page) if found["kind"] in kinds}


def examples() -> dict[str, str]:
    """File -> content of every new file in docs/adding.md."""
    return _blocks("python", "c")


def edit(tree: Path, file: str) -> None:
    """Change a file of a copy of the tree as docs/adding.md says, where its lines stand exactly once."""
    lines = _blocks("diff")[file].splitlines()
    before, after = ("\n".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
    text = (tree / file).read_text(encoding="utf-8")
    assert text.count(before) == 1, f"docs/adding.md changes lines that {file} does not have:\n{before}"
    (tree / file).write_text(text.replace(before, after), encoding="utf-8")
