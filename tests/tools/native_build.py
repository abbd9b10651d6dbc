"""The native library's C files as tests compile them: as setup.py does, under sanitizers, or quickly."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.tools.tree import ROOT

NATIVE = ROOT / "runtime" / "native"
CHECK = ROOT / "tests" / "native" / "c" / "check_kernels.c"
CC = os.environ.get("CC", "cc")


def need(*commands: str) -> None:
    """Skip without these commands, or fail where every test has to run."""
    missing = [command for command in commands if not shutil.which(command)]
    if missing:
        stop = pytest.fail if os.environ.get("KVQ_CI") == "1" else pytest.skip
        stop(f"{', '.join(missing)} not found: install gcc, gcc-aarch64-linux-gnu and qemu-user")


def recipe() -> dict[str, Any]:
    """What setup.py defines, such as COMMON: C file -> flags; nothing is built, paths are from anywhere."""
    # Its last statement would build.
    code = (ROOT / "setup.py").read_text().rpartition("\nsetup(")[0]
    made: dict[str, Any] = {"__name__": "setup"}
    exec(compile(code, "setup.py", "exec"), made)
    return made | {"NATIVE": NATIVE}


def host_kernels() -> str:
    """Name of setup.py's table of kernels for this machine."""
    names = {"x86_64": "X86", "aarch64": "ARM"}
    if platform.machine() not in names:
        pytest.skip(f"no kernels of its own for {platform.machine()}")
    return names[platform.machine()]


def lacking() -> set[str]:
    """The files of kernels that are compiled for this machine and cannot run on it."""
    from kvq.runtime.native.library import kernels

    return {file for file in recipe()[host_kernels()] if Path(file).stem not in kernels()}


def shipped() -> list[Path]:
    """The objects that the library of this machine is linked of: those which building it has left, if none is older."""
    made = recipe()
    functions = made["compiled"].__globals__  # of setup.py, which names its files from the folder it stands in
    functions |= {"NATIVE": NATIVE, "OBJECTS": ROOT / "build" / "objects"}
    return list(made["compiled"](made["unix_compiler"]()))


def run(*command: str | Path) -> None:
    """A compiler, which must succeed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def objects(folder: Path, *flags: str, tree: Path = NATIVE, files: Iterable[str] | None = None) -> list[Path]:
    """The C files of the library for this machine, or some of them, with these flags instead of -O3."""
    made = recipe()
    table = made["COMMON"] | made[host_kernels()]

    def compile_one(file: str) -> Path:
        target = folder / f"{Path(file).stem}.o"
        own = [flag for flag in (*made["FLAGS"], *table[file]) if flag != "-O3"]
        run(CC, *own, *flags, "-c", tree / file, "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, table if files is None else files))


def checker(folder: Path, compiler: str, linked: Iterable[Path], *flags: str, link: tuple[str, ...] = ()) -> Path:
    """check_kernels, linked with these objects of the library."""
    target = folder / "check_kernels.o"
    # The reference adds and multiplies as it is written.
    own = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", f"-I{NATIVE}"]
    run(compiler, *own, *flags, "-c", CHECK, "-o", target)
    run(compiler, *flags, *link, target, *linked, "-o", folder / "check", "-lm", "-pthread")
    return folder / "check"


def kernel_lines(*command: str | Path) -> dict[str, str]:
    """Run the program; what it says of each kernel."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


def leave_out(tree: Path, files: Iterable[str]) -> None:
    """Make these kernels of a copy of the C files ones that no machine has, which take no time to compile."""
    for file in files:
        included = [
            tree / file,
            *(tree / "isa" / name for name in re.findall(r'"(\w+\.h)"', (tree / file).read_text())),
        ]
        names = re.findall(r'^KERNEL\w*\(kvq_kernel_(\w+), "', "".join(map(Path.read_text, included)), re.M)
        assert names, f"{file} defines no kernel"
        kernels = [
            f'const kvq_kernel kvq_kernel_{name} = {{.name = "{name}", .available = nowhere}};' for name in names
        ]
        lines = ['#include "../kernel.h"', "static int nowhere(void) { return 0; }", *kernels, ""]
        (tree / file).write_text("\n".join(lines))
