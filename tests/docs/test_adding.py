"""The examples of docs/adding.md, put where it says into a copy of the tree, and run as it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^`([^`\n]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COPIED = ("kvq", "runtime", "controller", "exporter", "bench", "tests", "pyproject.toml")
LINKED = ("models", "docs")  # nothing is added there

# A text with the policy named first, on the backend named second: said again after a save, and by which backend.
SESSION = """
import sys, kvq
model = kvq.load("kvq-books")
policy, backend = sys.argv[1:3]
options = {"kv_bits": float(sys.argv[3])} if len(sys.argv) > 3 else {}
session = model.session(policy, backend=backend, **options)
session.append(model.encode("It was late, and the captain looked at the sea. " * 8))
session.save("kept.kvq")
said = [
    "".join(r.text for r in part.generate(max_tokens=8, temperature=0))
    for part in (session, model.load_session("kept.kvq", backend=backend))
]
assert said[0] == said[1], said
print(session.stats().backend, *(name for name, row in session.stats().precisions.items() if row["tokens"]))
"""


def sections() -> dict[str, dict[str, str]]:
    """Heading of each section -> file -> text of its blocks."""
    _, *parts = re.split(r"^## (.+)$", (ROOT / "docs" / "adding.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {title: dict(BLOCK.findall(text)) for title, text in zip(parts[::2], parts[1::2], strict=True)}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the tree with everything of the page in it."""
    folder = tmp_path_factory.mktemp("added")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    for blocks in sections().values():
        for name, text in blocks.items():
            assert not (folder / name).exists(), f"{name} is there already"
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def ran(tree: Path, *command: str, **environment: str) -> str:
    """Run Python in the tree; what it says on stdout."""
    env = {**os.environ, "PYTHONPATH": str(tree), **environment}
    done = subprocess.run([sys.executable, *command], cwd=tree, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tested(tree: Path, *arguments: str) -> None:
    """Run tests of the tree; at least one."""
    assert " passed" in ran(tree, "-m", "pytest", "-p", "no:cacheprovider", *arguments)


def test_every_section_has_an_example_and_they_are_in_our_style(tree):
    assert all(sections().values())
    files = [str(tree / name) for blocks in sections().values() for name in blocks if name.endswith(".py")]
    for command in (["check"], ["format", "--check"]):
        ran(tree, "-m", "ruff", *command, "--no-cache", *files)


def test_a_codec(tree):
    tested(tree, "tests/precision/test_normal_float.py")
    tested(tree, "tests/precision", "-k", "5 or every")
    assert ran(tree, "-c", SESSION, "knf4v4", "numpy").split() == ["numpy", "k16v16", "knf4v4", "recent"]


def test_a_policy(tree):
    tested(tree, "tests/policy/test_rare.py")
    tested(tree, "tests/policy/test_policies.py", "-k", "rare")
    assert "k4v4" in ran(tree, "-c", SESSION, "rare", "auto").split()
    assert "k2v2" in ran(tree, "-c", SESSION, "rare", "auto", "4.5").split()


def test_a_backend(tree):
    tested(tree, "tests/compute/test_attention.py", "-k", "dense and not mixture")
    assert ran(tree, "-c", SESSION, "k8v4", "dense").split() == ["dense", "k16v16", "k8v4", "recent"]
