"""The native library's C code: every kernel against a reference in C, also on 64-bit ARM, and its wheels.

`c/check_kernels.c` is compiled with the flags of setup.py and does the checking; here it is
built and run in several ways. A missing compiler or emulator skips a test, but fails it under
KVQ_CI=1: there it would pass for tested.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "runtime" / "native"
CHECK = ROOT / "tests" / "native" / "c" / "check_kernels.c"
ARM_CC, ARM_NM, EMULATOR = "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-nm", "qemu-aarch64"
CC = os.environ.get("CC", "cc")


def need(*commands: str) -> None:
    """Skip without these commands, or fail where every test has to run."""
    missing = [command for command in commands if not shutil.which(command)]
    if missing:
        stop = pytest.fail if os.environ.get("KVQ_CI") == "1" else pytest.skip
        stop(f"{', '.join(missing)} not found: install gcc, gcc-aarch64-linux-gnu and qemu-user")


def recipe() -> dict[str, Any]:
    """The constants at the top of setup.py, such as COMMON: C file -> flags; nothing else of it is run."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    tree.body = [statement for statement in tree.body if isinstance(statement, ast.Assign)]
    values: dict[str, Any] = {"Path": Path}
    exec(compile(tree, "setup.py", "exec"), values)
    return values


def c_sources() -> set[str]:
    """All C files and headers of the library, from the root; those that setup.py compiles are among them."""
    found = {str(path.relative_to(ROOT)) for path in NATIVE.rglob("*.[ch]")}
    made = recipe()
    compiled = {f"runtime/native/{file}" for file in made["COMMON"] | made["X86"] | made["ARM"]}
    assert compiled <= found
    assert compiled == {name for name in found if name.endswith(".c")}
    return found


def compiled_check(
    folder: Path, compiler: str, kernels: str, *flags: str, link: tuple[str, ...] = (), without: Collection[str] = ()
) -> Path:
    """check_kernels, linked with all C files of the library; `kernels` names setup.py's table of them.

    `flags` are for all files but those `without` them, which are named by their stems.
    """
    made = recipe()
    folder.mkdir(parents=True, exist_ok=True)
    sources = {NATIVE / file: [*made["FLAGS"], *extra] for file, extra in (made["COMMON"] | made[kernels]).items()}
    # The reference adds and multiplies as it is written.
    sources[CHECK] = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", f"-I{NATIVE}"]

    def run(*command: str | Path) -> None:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        run(compiler, *sources[source], *(() if source.stem in without else flags), "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    run(compiler, *flags, *link, *objects, "-o", folder / "check", "-lm", "-pthread")
    return folder / "check"


def kernel_lines(*command: str | Path) -> dict[str, str]:
    """Run the program; what it says of each kernel."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


def host_kernels() -> str:
    """Name of setup.py's table of kernels for this machine."""
    names = {"x86_64": "X86", "aarch64": "ARM"}
    if platform.machine() not in names:
        pytest.skip(f"no kernels of its own for {platform.machine()}")
    return names[platform.machine()]


@pytest.mark.slow
def test_every_kernel_equals_the_reference(tmp_path):
    need(CC)
    check = compiled_check(tmp_path, CC, host_kernels())
    lines = kernel_lines(check)
    names = {Path(file).stem for file in recipe()[host_kernels()]}
    assert lines.keys() - {"amx"} == {"plain"} | names  # tiles are in the file of AVX-512
    assert "attentions" in lines["plain"]
    assert kernel_lines(check, "odd").keys() == lines.keys()


@pytest.fixture(scope="module")
def arm_check(tmp_path_factory):
    need(ARM_CC, EMULATOR)
    return compiled_check(tmp_path_factory.mktemp("arm"), ARM_CC, "ARM", link=("-static",))


@pytest.mark.slow
@pytest.mark.parametrize(("cpu", "has_dotprod"), [("max", True), ("cortex-a53", False)])
def test_every_arm_kernel_equals_the_reference(arm_check, cpu, has_dotprod):
    lines = kernel_lines(EMULATOR, "-cpu", cpu, arm_check, "quick")
    assert set(lines) == {"plain", "neon", "dotprod"}
    assert "attentions" in lines["neon"]
    assert ("attentions" in lines["dotprod"]) == has_dotprod
    assert ("not available" in lines["dotprod"]) == (not has_dotprod)


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    """A copy of what a wheel is made of, without bundles and build results."""
    tree = tmp_path_factory.mktemp("source") / "kvq"
    tree.mkdir()
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "bundles")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("kvq", "bench", "controller", "exporter", "models", "runtime"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    return tree


def has_setuptools() -> bool:
    """Whether a setuptools of the version that pyproject.toml asks for is installed here; else pip has to fetch one."""
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


def build_wheel(tree: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """pip wheel with nothing of our own in the environment but what is given."""
    shutil.copytree(tree, folder / "tree")  # a build leaves its results there, for the next one to find
    ours = ("KVQ_REQUIRE_NATIVE", "CC", "CFLAGS", "LDFLAGS", "LDSHARED", "AR", "_PYTHON_HOST_PLATFORM")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", f"--wheel-dir={folder}", str(folder / "tree")]
    if has_setuptools():
        command.append("--no-build-isolation")
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_wheel_for_arm_is_made_by_cross_compiling(source_tree, tmp_path):
    need(ARM_CC, ARM_NM)
    done = build_wheel(source_tree, tmp_path, CC=ARM_CC, _PYTHON_HOST_PLATFORM="linux-aarch64", KVQ_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = tmp_path.glob("*.whl")
    assert re.search(r"-py3-none-manylinux_2_\d+_aarch64\.whl$", wheel.name)
    library = Path(zipfile.ZipFile(wheel).extract("kvq/runtime/native/libkvq.so", tmp_path))
    header = library.read_bytes()[:20]
    assert (header[:4], int.from_bytes(header[18:20], "little")) == (b"\x7fELF", 183)  # EM_AARCH64
    symbols = subprocess.run([ARM_NM, "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    assert {"kvq_attend", "kvq_encode", "RegisterCustomOps"} <= set(symbols.stdout.split())


@pytest.mark.slow
def test_without_a_compiler_a_wheel_is_made_that_runs_on_numpy(source_tree, tmp_path):
    done = build_wheel(source_tree, tmp_path, CC="/nonexistent/cc")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert re.search(r"kvq: the native library was not built \(.+\); attention will run on numpy", said), said
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"kvq/{name}" for name in c_sources()} <= set(names)
    assert "kvq/runtime/native/library.py" in names
    assert not any(name.endswith(".so") for name in names)


@pytest.mark.slow
def test_a_source_distribution_holds_all_of_the_library_s_sources(source_tree, tmp_path):
    if not has_setuptools():
        pytest.skip("setuptools of the version that pyproject.toml asks for is not installed")
    tree = shutil.copytree(source_tree, tmp_path / "tree")
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", build, str(tmp_path)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert c_sources() <= names


@pytest.mark.slow
def test_a_required_library_that_cannot_be_built_is_an_error(source_tree, tmp_path):
    done = build_wheel(source_tree, tmp_path, CC="/nonexistent/cc", KVQ_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert not list(tmp_path.glob("*.whl"))
