"""The package as it is installed: its name, what its extras bring, and that nobody is told to install another's."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kvq
from kvq.runtime.cli.main import EXTRA_OF
from tests.tools.tree import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TEXTS = {".md", ".py", ".toml", ".txt", ".sh", ".yml", ".yaml", ".html", ".c", ".h"}
# On the registry kvq is somebody else's project.
MISNAMED = re.compile(r"""pip install[^|&`)\n]*['"`\s]kvq(?![-\w./])""")
DISTRIBUTIONS = {"optimum": "optimum-onnx", "onnx_ir": "onnx"}  # module -> the requirement that brings it
HEAVY = {"torch", "transformers", "optimum", "optimum-onnx"}


def requirements(extra: str) -> set[str]:
    """Names of the distributions that an extra asks for itself, those of the extras in it included."""
    found = set()
    for requirement in EXTRAS[extra]:
        name = re.match(r"[\w-]+", requirement)[0]
        if name == PROJECT["name"]:
            for inner in re.search(r"\[(.*)\]", requirement)[1].split(","):
                found |= requirements(inner.strip())
        else:
            found.add(name)
    return found


def test_name_and_version():
    assert (PROJECT["name"], PROJECT["version"]) == ("kvq-run", kvq.__version__)
    assert set(PROJECT["scripts"]) == {"kvq", "kvq-run"}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("pip install kvq", True),
        ("pip install 'kvq[server]'", True),
        ("pip install -c constraints.txt 'kvq\\[export]'", True),
        ("pip install kvq, then", True),
        ("pip install kvq-run", False),
        ("pip install 'kvq-run[server]'", False),
        ("pip install -q . && kvq chat", False),
        ("pip install ./kvq", False),
        ("`pip install kvq-run` brings `kvq`", False),
    ],
)
def test_what_counts_as_a_wrong_name(text, wrong):
    assert bool(MISNAMED.search(text)) == wrong


@pytest.mark.slow
def test_nobody_is_told_to_install_another_project():
    files = [path for path in ROOT.rglob("*") if path.suffix in TEXTS and path != Path(__file__).resolve()]
    ours = [path for path in files if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]
    assert ROOT / "README.md" in ours
    named = [
        f"{path.relative_to(ROOT)}: {found[0]}"
        for path in ours
        for found in MISNAMED.finditer(path.read_text(errors="replace"))
    ]
    assert not named, "the distribution is kvq-run: " + "; ".join(named)


@pytest.mark.parametrize("extra", ["export", "hub", "plot", "server", "test"])
def test_an_extra_without_training_brings_no_torch(extra):
    assert not HEAVY & (requirements(extra) | {re.match(r"[\w-]+", name)[0] for name in PROJECT["dependencies"]})


@pytest.mark.parametrize("package", EXTRA_OF)
def test_the_extra_named_for_a_missing_package_brings_it(package):
    assert DISTRIBUTIONS.get(package, package) in requirements(EXTRA_OF[package])


def test_what_extras_ask_for_is_pinned():
    """constraints.txt pins what the extras ask for; tasks (lm_eval) are not part of the tests."""
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    asked = set().union(*(requirements(extra) for extra in EXTRAS)) - {"lm_eval", "setuptools"}
    assert asked <= pinned


@pytest.mark.parametrize(
    "module",
    [
        "kvq",
        "kvq.runtime.session.model",
        "kvq.runtime.cli.run",
        "kvq.exporter.cli",
        "kvq.exporter.export",
        "kvq.exporter.sources",
    ],
)
def test_importing_brings_neither_torch_nor_what_needs_it(module):
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())
