"""The map of the tests, docs/tests.md: ``python -m tests.tools.map`` writes anew which file guards which promise."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

from tests.tools.tree import DOCS, ROOT, named, parsed, sources

PAGE = DOCS / "tests.md"
HEADING = "## Which file guards which promise\n"


def promise(path: Path) -> str:
    """What a test file guards, in its own words: the first paragraph of its docstring."""
    return " ".join((ast.get_docstring(parsed(path)) or "").partition("\n\n")[0].split())


def listing() -> str:
    """The list below HEADING: for each folder its test files, one entry each."""
    folders: dict[str, list[Path]] = {}
    for path in sources("tests"):
        if path.name.startswith("test_"):
            folders.setdefault(named(path.parent), []).append(path)
    parts = []
    for folder, files in sorted(folders.items()):
        entries = [
            textwrap.fill(f"* `{named(path)}`: {promise(path)}", 120, subsequent_indent="  ", break_on_hyphens=False)
            for path in files
        ]
        parts.append(f"### {folder}\n\n" + "\n".join(entries) + "\n")
    return "\n".join(parts)


def main() -> None:
    """Write the list; what stands above HEADING stays."""
    head = PAGE.read_text(encoding="utf-8").partition(HEADING)[0]
    PAGE.write_text(f"{head}{HEADING}\n{listing()}", encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} is written")


if __name__ == "__main__":
    main()
