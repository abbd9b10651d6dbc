"""docs/adding.md followed to the letter: its examples, put where they say, work in a copy of the tree; nothing else is
touched.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.examples import edit, examples
from tests.tools.native_build import leave_out, recipe
from tests.tools.tree import ROOT

pytestmark = pytest.mark.slow
PACKAGES = ("kvq", "runtime", "controller", "exporter", "models", "bench", "tests")


def tree_with(folder: Path, *files: str) -> Path:
    """A copy of the packages and tests, with these examples of docs/adding.md in it as new files."""
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "bundles")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    (folder / "models" / "bundles").symlink_to(ROOT / "models" / "bundles")
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder / file)
    for file in files:
        target = folder / file
        assert not target.exists(), f"{file} is no new file"
        target.write_text(examples()[file])
    return folder


def python(tree: Path, *arguments: str | Path, **variables: str) -> str:
    """What Python prints on the packages of the tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(tree: Path, code: str, *arguments: str | Path, **variables: str) -> str:
    """What a script prints that runs on the packages of the tree."""
    return python(tree, "-c", code, *arguments, **variables)


def passes(tree: Path, *arguments: str) -> None:
    """Run tests of the tree, at least one."""
    assert " passed" in python(tree, "-m", "pytest", "-p", "no:cacheprovider", *arguments)


SAME_ON_BOTH_BACKENDS = """
import sys
import numpy as np
import kvq
from pathlib import Path
bundle, policy, name, scratch = sys.argv[1:]
assert Path(kvq.__file__).is_relative_to(Path.cwd()), kvq.__file__
rng = np.random.default_rng(3)
model = kvq.load(bundle)
ids = rng.integers(0, model.architecture.vocab, 150)
found = []
for backend in ("numpy", "native"):
    session = model.session(policy, recent=8, backend=backend)
    logits = [session.append(ids[:100], all_logits=True)]
    logits += [session.append([token])[None] for token in ids[100:120]]
    fork = session.fork()
    logits += [fork.append([token])[None] for token in ids[120:]]
    fork.trim(90)
    logits += [fork.append([token])[None] for token in ids[90:100]]
    session.save(scratch + "/session.kvq")
    loaded = model.load_session(scratch + "/session.kvq", backend=backend)
    np.testing.assert_array_equal(loaded.append([ids[120]]), session.append([ids[120]]))
    stats = session.stats()
    assert stats.precisions[name]["tokens"] > 0, stats.precisions
    assert stats.backend == backend
    found.append(np.concatenate(logits))
    print(stats.backend_detail)
# A number on the border of two codes may fall to either side: logits then differ by what that code is worth.
np.testing.assert_allclose(found[0], found[1], rtol=0, atol=0.05)
"""


def test_a_codec_is_one_file(tmp_path, tiny_bundle):
    """Native code has no kernels for it: it works through numpy, and the statistics say so."""
    tree = tree_with(tmp_path / "tree", "runtime/precision/codecs/stream.py", "tests/precision/test_stream.py")
    said = run(tree, SAME_ON_BOTH_BACKENDS, tiny_bundle, "ks3vs3", "ks3vs3", tmp_path)
    assert "ks3vs3" in said, said
    said = run(tree, SAME_ON_BOTH_BACKENDS, tiny_bundle, "k4vs3", "k4vs3", tmp_path)
    assert "k4vs3" in said, said
    passes(tree, "tests/precision/test_stream.py")


def test_every_test_of_codecs_takes_a_new_one(tmp_path):
    tree = tree_with(tmp_path / "tree", "runtime/precision/codecs/stream.py")
    passes(tree, "tests/precision")


def test_a_policy_is_one_file(tmp_path, tiny_bundle):
    files = "controller/policies/parity.py", "controller/policies/rare.py", "tests/policy/test_rare.py"
    tree = tree_with(tmp_path / "tree", *files)
    run(tree, SAME_ON_BOTH_BACKENDS, tiny_bundle, "parity", "k8v4", tmp_path)
    run(tree, SAME_ON_BOTH_BACKENDS, tiny_bundle, "rare", "k4v4", tmp_path)
    line = run(tree, "import kvq; print(sorted(kvq.POLICIES))")
    assert "'parity'" in line
    assert "'rare'" in line
    passes(tree, "tests/policy/test_rare.py")
    passes(tree, "tests/policy/test_policies.py", "-k", "parity or rare")


def test_a_backend_is_one_file(tmp_path):
    tree = tree_with(tmp_path / "tree", "runtime/compute/backends/dense_backend.py")
    passes(tree, "tests/compute/test_attention.py", "-k", "dense and not mixture and not every and not longer")
    code = "import kvq; s = kvq.load('kvq-books').session('k8v4'); s.append([1, 2, 3]); print(s.stats().backend)"
    assert run(tree, code, KVQ_BACKEND="dense") == "dense\n"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the example is of x86-64")
def test_an_instruction_set_is_one_file_and_four_names(tmp_path, tiny_bundle):
    tree = tree_with(tmp_path / "tree", "runtime/native/isa/sse4.c")
    for file in ("setup.py", "runtime/native/available.c", "runtime/native/kernel.h", "runtime/native/attention.c"):
        edit(tree, file)
    # All of it would be compiled for two minutes, and but one kernel is asked for.
    leave_out(tree / "runtime" / "native", recipe()["X86"])
    recipe_there = tree / "setup.py"
    recipe_there.write_text(recipe_there.read_text().replace('"-O3"', '"-O1"'))
    (tree / "runtime" / "native" / "libkvq.so").unlink()
    python(tree, "setup.py", "-q", "build_py", "--build-lib", tmp_path / "built", KVQ_REQUIRE_NATIVE="1")
    said = run(tree, SAME_ON_BOTH_BACKENDS, tiny_bundle, "mixed", "k4v4", tmp_path, KVQ_NATIVE_ISA="sse4")
    assert said.splitlines()[-1] == "sse4"
    passes(tree, "tests/native/test_native.py", "-k", "sse4 and (group or long)")


def test_every_section_has_an_example_in_our_style(tmp_path):
    page = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
    sections = page.split("\n## ")[1:]
    assert len(sections) == 6
    assert all(any(file in section for file in examples()) for section in sections)
    tree = tree_with(tmp_path / "tree", *examples())
    files = [file for file in examples() if file.endswith(".py")]
    for command in (["check"], ["format", "--check"]):
        python(tree, "-m", "ruff", *command, "--no-cache", *files)


@pytest.mark.parametrize("id_", [1, 29])
def test_an_id_need_not_be_the_number_of_bits(tmp_path, id_):
    """Shades and tables go by the bits of the codes."""
    tree = tree_with(tmp_path / "tree", "runtime/precision/codecs/stream.py")
    file = tree / "runtime/precision/codecs/stream.py"
    file.write_text(file.read_text().replace("Precision(6,", f"Precision({id_},"))
    page = tmp_path / "page.html"
    options = ["-m", "kvq-books", "-p", "ks3v4", "--json", "--html", page]
    found = python(tree, "-m", "kvq", "inspect", *options, "One " * 60)
    token = json.loads(found)["tokens"][10]
    assert (token["chosen_key_bits"], token["chosen_value_bits"]) == (token["key_bits"], token["value_bits"]) == (3, 4)
    assert "ks3v4" in page.read_text()


@pytest.mark.parametrize("id_", [4, 0, 32])
def test_a_codec_that_takes_anothers_id_is_refused(tmp_path, id_):
    tree = tree_with(tmp_path / "tree", "runtime/precision/codecs/stream.py")
    file = tree / "runtime/precision/codecs/stream.py"
    file.write_text(file.read_text().replace("Precision(6,", f"Precision({id_},"))
    with pytest.raises(AssertionError, match=r"RuntimeError: .*(redefines|ids are 1 to 31)"):
        run(tree, "import kvq; kvq.load")
