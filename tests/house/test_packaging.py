"""The package as it is installed: its name, what its extras bring, and that nobody is told to install another's."""

import ast
import platform
import re
import shutil
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
OTHERS = "kvq"  # on the package registry it is another project's
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
        (f"pip install {OTHERS}", True),
        (f"pip install '{OTHERS}[server]'", True),
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


def manylinux(library: bytes) -> str | None:
    """What setup.py says of a library; nothing else of it is run."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    tree.body = [each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == "manylinux"]
    found: dict = {"re": re}
    exec(compile(tree, "setup.py", "exec"), found)
    return found["manylinux"](library)


def test_the_tag_of_a_wheel_says_which_glibc_its_library_needs():
    """Compared with what the linker's own tool lists."""
    library = ROOT / "runtime/native/libkvq.so"
    if not library.exists() or shutil.which("objdump") is None or platform.libc_ver()[0] != "glibc":
        pytest.skip("there is no library here, or nothing to read it with")
    listed = subprocess.run(["objdump", "-T", library], capture_output=True, text=True, check=True).stdout
    newest = max(int(minor) for minor in re.findall(r"GLIBC_2\.(\d+)", listed))
    assert manylinux(library.read_bytes()) == f"manylinux_2_{max(17, newest)}_{platform.machine()}"
    needed = subprocess.run(["objdump", "-p", library], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"NEEDED\s+(\S+)", needed)) <= {"libc.so.6", "libm.so.6"} | set(
        re.findall(r"ld-linux\S+", needed)
    )


@pytest.mark.parametrize(
    ("library", "tag"),
    [
        (b"\x7fELF" + bytes(14) + b"\xb7\0" + b"GLIBC_2.17\0GLIBC_2.29\0", "manylinux_2_29_aarch64"),
        (b"\x7fELF" + bytes(14) + b"\x3e\0" + b"GLIBC_2.2.5\0", "manylinux_2_17_x86_64"),
        (b"\x7fELF" + bytes(14) + b"\x3e\0" + b"musl", None),
        (b"\x7fELF" + bytes(14) + b"\xf3\0" + b"GLIBC_2.27\0", None),
        (b"\xcf\xfa\xed\xfe" + bytes(40), None),
    ],
)
def test_libraries_of_other_kinds_have_the_tag_of_the_machine(library, tag):
    assert manylinux(library) == tag
