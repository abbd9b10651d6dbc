"""Lowest and newest versions of what kvq depends on: installed in an environment of their own, and tested there.

    python -m tests.tools.versions lowest FOLDER [pytest's arguments]
    python -m tests.tools.versions newest FOLDER

The tests are the quick ones if none are named. What the extra `test` has is installed, which is everything that needs
no torch; a lowest version is the one that pyproject.toml names, of direct dependencies.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

from tests.tools.tree import ROOT

KINDS = ("lowest", "newest")
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[(?P<extras>[^\]]*)\])?(?P<bounds>.*)")
OURS = "kvq-run"


def requirements(extra: str = "test") -> dict[str, str]:
    """Bounds of every package that the library and one of its extras ask for directly, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, str] = {}
    todo, seen = [*project["dependencies"], f"{OURS}[{extra}]"], set()
    while todo:
        parts = REQUIREMENT.fullmatch(todo.pop())
        assert parts is not None
        if parts["name"] != OURS:
            found[parts["name"]] = parts["bounds"]
            continue
        for name in {each.strip() for each in parts["extras"].split(",")} - seen:
            seen.add(name)
            todo += project["optional-dependencies"][name]
    return found


def lowest(bounds: str) -> str:
    """The lowest version within bounds, as a bound: ">=1.5,<2" gives "==1.5"."""
    found = re.search(r">=\s*([^,\s]+)", bounds)
    assert found is not None, bounds
    return "==" + found[1]


def wanted(kind: str) -> list[str]:
    """What pip is asked for."""
    return [name + (lowest(bounds) if kind == "lowest" else bounds) for name, bounds in sorted(requirements().items())]


def main(kind: str, folder: str, *arguments: str) -> int:
    """Make the environment, say its versions, and run tests in it; pytest's exit code."""
    assert kind in KINDS, f"one of: {', '.join(KINDS)}"
    venv.create(folder, with_pip=True)
    python = Path(folder, "bin", "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "--upgrade", *wanted(kind)], check=True)
    names = sorted(requirements())
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True
    )
    versions = dict(line.lower().replace("_", "-").split("==") for line in listed.stdout.split())
    print(" ".join(f"{name}=={versions[name.replace('_', '-').lower()]}" for name in names), flush=True)
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *(arguments or ("--quick",))]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
