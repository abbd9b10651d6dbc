"""The native library's C code: every kernel against a reference in C, also on 64-bit ARM, and its wheels.

`c/check_kernels.c` is linked with the objects that setup.py makes and does the checking; here it is
run in several ways. A missing compiler or emulator skips a test, but fails it under
KVQ_CI=1: there it would pass for tested.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.tools.native_build import CC, NATIVE, checker, host_kernels, kernel_lines, need, recipe, shipped
from tests.tools.tree import ROOT

ARM_CC, ARM_NM, EMULATOR = "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-nm", "qemu-aarch64"


def c_sources() -> set[str]:
    """All C files and headers of the library, from the root; those that setup.py compiles are among them."""
    found = {str(path.relative_to(ROOT)) for path in NATIVE.rglob("*.[ch]")}
    made = recipe()
    compiled = {f"runtime/native/{file}" for file in made["COMMON"] | made["X86"] | made["ARM"]}
    assert compiled <= found
    assert compiled == {name for name in found if name.endswith(".c")}
    return found


@pytest.mark.slow
def test_every_kernel_equals_the_reference(tmp_path):
    need(CC)
    check = checker(tmp_path, CC, shipped())
    lines = kernel_lines(check)
    names = {Path(file).stem for file in recipe()[host_kernels()]}
    assert lines.keys() - {"amx"} == {"plain"} | names  # tiles are in the file of AVX-512
    assert "attentions" in lines["plain"]
    assert kernel_lines(check, "odd").keys() == lines.keys()


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


@pytest.fixture(scope="module")
def arm_build(source_tree, tmp_path_factory):
    """A folder with a wheel for ARM, and below it what building it has left."""
    need(ARM_CC)
    folder = tmp_path_factory.mktemp("arm-wheel")
    done = build_wheel(source_tree, folder, CC=ARM_CC, _PYTHON_HOST_PLATFORM="linux-aarch64", KVQ_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def arm_check(arm_build, tmp_path_factory):
    """The program with the very objects that the wheel's library is linked of."""
    need(ARM_CC, EMULATOR)
    objects = list((arm_build / "tree" / "build" / "objects").glob("*.o"))
    assert len(objects) == len(recipe()["COMMON"] | recipe()["ARM"])
    return checker(tmp_path_factory.mktemp("arm"), ARM_CC, objects, link=("-static",))


@pytest.mark.slow
def test_every_arm_kernel_equals_the_reference_on_the_least_processor(arm_check):
    """One without dot products, where any of their instructions would end the program."""
    lines = kernel_lines(EMULATOR, "-cpu", "cortex-a53", arm_check, "quick")
    assert set(lines) == {"plain", "neon", "dotprod"}
    assert "attentions" in lines["plain"]
    assert "attentions" in lines["neon"]
    assert "not available" in lines["dotprod"]


@pytest.mark.slow
def test_the_arm_kernel_with_dot_products_equals_the_reference(arm_check):
    """Alone: the emulator takes a minute for the others, which the least processor has run."""
    lines = kernel_lines(EMULATOR, "-cpu", "max", arm_check, "quick", "dotprod")
    assert "attentions" in lines.pop("dotprod")
    assert lines == {"plain": "not asked for", "neon": "not asked for"}  # they are there


@pytest.mark.slow
def test_a_wheel_for_arm_is_made_by_cross_compiling(arm_build, tmp_path):
    need(ARM_NM)
    [wheel] = arm_build.glob("*.whl")
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
