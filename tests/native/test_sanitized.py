"""The native library under the address and undefined-behaviour sanitizers: alone, and in a process of kvq."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvq.runtime.native.library import kernels
from tests.tools.native_build import CC, NATIVE, checker, kernel_lines, lacking, leave_out, need, objects
from tests.tools.tree import ROOT

pytestmark = pytest.mark.slow

# -O1, and checks of addresses by calls: what is optimized and inlined takes the compiler several times as long. What
# -O1 leaves out, no optimized library does either.
SANITIZED = ["-O1", "-g1", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all",
             "--param=asan-instrumentation-with-call-threshold=0"]  # fmt: skip
# Instruction sets that such a process was seen clean on: the others have to be asked for, until they were.
SEEN = ("plain", "avx2")


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    need(CC)
    folder = tmp_path_factory.mktemp("sanitized")
    tree = shutil.copytree(NATIVE, folder / "native", ignore=shutil.ignore_patterns("*.so", "*.py", "__pycache__"))
    # What this machine cannot run has nothing to say, and would take a minute of the compiler's time.
    leave_out(tree, lacking())
    return checker(folder, CC, objects(folder, *SANITIZED, tree=tree), *SANITIZED)


def test_no_kernel_reads_beyond_a_page_or_does_the_undefined(check):
    assert "attentions" in kernel_lines(check, "quick")["plain"]


def test_queries_that_are_tiny_or_not_finite_do_nothing_undefined(check):
    kernel_lines(check, "odd")


USED = """
import sys
import numpy as np
import kvq

bundle, scratch = sys.argv[1:]
model = kvq.load(bundle)
rng = np.random.default_rng(5)
ids = rng.integers(0, model.architecture.vocab, 200)
for policy, options in (("mixed", {}), ("k3v2", {"prefill": "stepwise"}), ("rule", {"kv_bits": 7}), ("int8", {})):
    session = model.session(policy, recent=8, **options)
    session.append(ids[:120])
    for token in ids[120:140]:
        session.append([token])
    fork = session.fork()
    fork.trim(60)
    model.step([(session, ids[140:141]), (fork, ids[140:143])])
    model.step([(session, ids[141:180]), (fork, ids[143:144]), (model.session("int4"), ids[:9])])
    session.save(scratch + "/session.kvq")
    loaded = model.load_session(scratch + "/session.kvq")
    np.testing.assert_array_equal(loaded.append(ids[180:181]), session.append(ids[180:181]))
    list(session.generate([int(each) for each in ids[181:200]], max_tokens=12))
    stats = session.stats()
    assert stats.backend == "native", stats
    print(policy, stats.backend_detail)
"""


@pytest.fixture(scope="module")
def sanitized_tree(check, tmp_path_factory):
    """A checkout of kvq with the sanitized library in it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("kvq", "controller", "models", "runtime", "exporter"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "bundles"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    library = tree / "runtime" / "native" / "libkvq.so"
    linked_to = [str(path) for path in check.parent.glob("*.o") if path.stem != "check_kernels"]
    linked = subprocess.run(
        [CC, *SANITIZED, "-shared", *linked_to, "-o", str(library), "-lm"], capture_output=True, text=True
    )
    assert linked.returncode == 0, linked.stderr
    return tree


@pytest.mark.parametrize("name", kernels())
def test_a_process_of_kvq_runs_on_the_sanitized_library(sanitized_tree, tiny_bundle, tmp_path, name):
    """Threads of onnxruntime in the operators, arrays of numpy under the pages."""
    if name not in SEEN and os.environ.get("KVQ_SANITIZED") != "1":
        pytest.skip("asked for by KVQ_SANITIZED=1")
    asked = subprocess.run([CC, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    # Before anything else in the process; what Python and others leave behind at the end is not ours.
    sanitizer = {"LD_PRELOAD": str(Path(asked.stdout.strip()).resolve()), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", USED, str(tiny_bundle), str(tmp_path)],
        cwd=sanitized_tree,
        env=os.environ | sanitizer | {"PYTHONPATH": str(sanitized_tree), "KVQ_NATIVE_ISA": name},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert [line.split() for line in done.stdout.splitlines()] == [
        [each, name] for each in ("mixed", "k3v2", "rule", "int8")
    ]
