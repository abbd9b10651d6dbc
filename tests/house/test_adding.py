"""docs/adding.md followed to the letter: its examples, put where they say, work in a copy of the tree; nothing else is
touched.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("kvq", "runtime", "controller", "exporter", "models")
# A fenced block whose first line names the file it goes to.
BLOCK = re.compile(
    r"^```python\n# ((?:runtime|controller|exporter|tests)/[\w/]+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


def examples() -> dict[str, str]:
    """File -> content of every example in docs/adding.md."""
    return dict(BLOCK.findall((ROOT / "docs" / "adding.md").read_text()))


def tree_with(folder: Path, *files: str) -> Path:
    """A copy of the packages, with these examples of docs/adding.md in it as new files."""
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "bundles")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    (folder / "pyproject.toml").write_text("")  # what makes it a checkout
    for file in files:
        target = folder / file
        assert not target.exists(), f"{file} is no new file"
        target.write_text(examples()[file])
    return folder


def run(tree: Path, code: str, *arguments: str | Path) -> str:
    """What a script prints that runs on the packages of the tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tree)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
np.testing.assert_allclose(found[0], found[1], atol=2e-3)
"""


def test_a_codec_is_one_file(tmp_path, tiny_bundle):
    """Native code has no kernels for it: it works through numpy, and the statistics say so."""
    tree = tree_with(tmp_path / "tree", "runtime/precision/codecs/three.py")
    said = run(tree, SAME_ON_BOTH_BACKENDS, tiny_bundle, "k3v3", "k3v3", tmp_path)
    assert "k3v3" in said, said
    said = run(tree, SAME_ON_BOTH_BACKENDS, tiny_bundle, "k4v3", "k4v3", tmp_path)
    assert "k4v3" in said, said


def test_a_policy_is_one_file(tmp_path, tiny_bundle):
    tree = tree_with(tmp_path / "tree", "controller/policies/parity.py")
    run(tree, SAME_ON_BOTH_BACKENDS, tiny_bundle, "parity", "k8v4", tmp_path)
    line = run(tree, "import kvq; print(sorted(kvq.POLICIES))")
    assert "'parity'" in line


def test_every_example_is_there_to_be_followed():
    assert {"runtime/precision/codecs/three.py", "controller/policies/parity.py"} <= examples().keys()


@pytest.mark.parametrize("id_", [4, 0, 32])
def test_a_codec_that_takes_anothers_id_is_refused(tmp_path, id_):
    tree = tree_with(tmp_path / "tree", "runtime/precision/codecs/three.py")
    file = tree / "runtime/precision/codecs/three.py"
    file.write_text(file.read_text().replace("Precision(3,", f"Precision({id_},"))
    with pytest.raises(AssertionError, match=r"RuntimeError: .*(redefines|ids are 1 to 31)"):
        run(tree, "import kvq; kvq.load")
