"""Builds the native library; everything else about the package stands in pyproject.toml.

The library is plain C without Python's headers and is loaded with ctypes, so one wheel serves
every Python version of a platform. Without a C compiler the package installs all the same and
runs on numpy; KVQ_REQUIRE_NATIVE=1 makes a failed build an error instead.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools._distutils.ccompiler import new_compiler
from setuptools._distutils.sysconfig import customize_compiler
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

NATIVE = Path("runtime", "native")
OBJECTS = Path("build", "objects")
FLAGS = ["-std=gnu11", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast",
         "-Werror=implicit-function-declaration"]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# Every kernel is one file, compiled for its instruction set; which one runs is decided on the user's machine.
X86 = {
    "isa/avx2.c": AVX2,
    "isa/avxvnni.c": [*AVX2, "-mavxvnni"],
    "isa/avx512.c": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", *AVX2[1:],
                     "-mprefer-vector-width=512"],
}  # fmt: skip
ARM = {"isa/neon.c": [], "isa/dotprod.c": ["-march=armv8.2-a+dotprod"]}
COMMON = {
    file: []
    for file in ("attention.c", "available.c", "chain.c", "checks.c", "decode.c", "layers.c", "operators.c",
                 "product.c", "projected.c", "rows.c", "stepwise.c", "team.c", "isa/plain.c")
}  # fmt: skip


def build_native(targets: list[Path]) -> None:
    """Compile and link the library, and put it in each place; CC, CFLAGS and LDFLAGS are heard."""
    compiler = unix_compiler()
    objects = compiled(compiler)
    with tempfile.TemporaryDirectory() as folder:
        linked = Path(folder, targets[0].name)
        compiler.link_shared_object([*map(str, objects)], str(linked), libraries=["m"])
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            # A library that is in use must not be written over: put the new one in its place.
            part = target.with_name(target.name + ".part")
            part.write_bytes(linked.read_bytes())
            part.chmod(0o755)
            part.replace(target)


def unix_compiler():
    """The compiler that setuptools uses, with what CC, CFLAGS and LDFLAGS say."""
    compiler = new_compiler()
    customize_compiler(compiler)
    return compiler


def compiled(compiler) -> list[Path]:
    """The objects of all C files. One that was made of the same text, flags and compiler is taken as it is."""
    # The compiler takes half a minute for a kernel: who changes one need not wait for the others, nor do the tests,
    # which link these objects to a program that checks them.
    files = COMMON | kernels(compiler)
    version = subprocess.run([compiler.compiler_so[0], "--version"], capture_output=True, check=True).stdout
    OBJECTS.mkdir(parents=True, exist_ok=True)

    def one(file):
        flags, stem = [*FLAGS, *files[file]], Path(file).stem
        command = [*compiler.compiler_so, *flags]
        text = subprocess.run([*command, "-E", "-P", str(NATIVE / file)], capture_output=True).stdout
        digest = hashlib.sha256(b"\0".join([version, repr(command).encode(), text])).hexdigest()
        target = OBJECTS / f"{stem}-{digest[:32]}.o"
        if target.exists() and text:
            return target
        with tempfile.TemporaryDirectory(dir=OBJECTS) as folder:
            [made] = compiler.compile([str(NATIVE / file)], output_dir=folder, extra_postargs=flags)
            for old in OBJECTS.glob(f"{stem}-*.o"):
                old.unlink(missing_ok=True)
            Path(made).replace(target)
        return target

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, files))


def kernels(compiler):
    """Kernel files of the machine that the compiler builds for, which need not be this one."""
    macros = subprocess.run(
        [*compiler.compiler_so[:1], "-dM", "-E", "-x", "c", os.devnull], capture_output=True, text=True, check=True
    ).stdout
    return X86 if "__x86_64__" in macros else ARM if "__aarch64__" in macros else {}


def manylinux(library: bytes) -> str | None:
    """The platform tag of PEP 600 for an ELF library that links glibc alone; None for any other.

    It says which glibc has all symbols that the library names, and which machine it is for: not the one that builds.
    """
    machine = {62: "x86_64", 183: "aarch64"}.get(int.from_bytes(library[18:20], "little"))
    versions = [int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", library)]
    if library[:4] != b"\x7fELF" or machine is None or not versions:
        return None
    return f"manylinux_2_{max(17, *versions)}_{machine}"


class BuildWithNative(build_py):
    """Packages, and the library beside the Python files that load it."""

    built = False
    platform: str | None = None

    def run(self):
        super().run()
        # Beside the sources too: Python started in a checkout, as the tests are, runs from these.
        places = [NATIVE] if self.editable_mode else [NATIVE, Path(self.build_lib, "kvq", NATIVE)]
        libraries = [place / "libkvq.so" for place in places]
        for library in libraries:
            library.unlink(missing_ok=True)  # of an earlier build: it must not stand in for one that fails
        try:
            build_native(libraries)
            BuildWithNative.built = True
            BuildWithNative.platform = manylinux(libraries[-1].read_bytes())
        except Exception as error:  # no compiler, or one that fails: its errors share no base class
            if os.environ.get("KVQ_REQUIRE_NATIVE") == "1":
                raise
            print(f"kvq: the native library was not built ({error}); attention will run on numpy", file=sys.stderr)


class PlatformDistribution(Distribution):
    """A wheel with a compiled library in it belongs to a platform."""

    def has_ext_modules(self):
        return True


class AnyPythonWheel(bdist_wheel):
    """...but to no Python version; without the library it runs anywhere."""

    def get_tag(self):
        platform = BuildWithNative.platform or super().get_tag()[2]
        return "py3", "none", platform if BuildWithNative.built else "any"


setup(cmdclass={"build_py": BuildWithNative, "bdist_wheel": AnyPythonWheel}, distclass=PlatformDistribution)
