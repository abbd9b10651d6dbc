"""Nobody imports upwards: the floor plan of `layers` is kept, and a plan that is broken is found."""

import pytest

from tests.house.layers import broken
from tests.tools.tree import ROOT


@pytest.mark.slow
def test_nobody_imports_upwards():
    assert not broken(ROOT)


GOOD = {
    "runtime/errors.py": "class KvqError(Exception): ...\n",
    "runtime/kv/store.py": "from kvq.runtime.errors import KvqError\n",
    "runtime/session/session.py": "from kvq.runtime.kv.store import KVStore\n",
    "controller/policies/rule.py": "from kvq.runtime.kv.store import KVStore\n",
}


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("runtime/kv/store.py", "from kvq.runtime.session.session import Session\n"),
        ("runtime/kv/store.py", "import kvq.runtime.session.session\n"),
        ("runtime/kv/store.py", "def f():\n    from kvq.runtime.session import session\n"),
        ("runtime/kv/store.py", "if TYPE_CHECKING:\n    from kvq.runtime.session.session import Session\n"),
        ("runtime/kv/store.py", "from ..session.session import Session\n"),
        ("runtime/session/session.py", "from kvq.controller.policies import make_policy\n"),
        ("runtime/session/session.py", "from kvq import load\n"),
        ("runtime/session/session.py", "from kvq.runtime import cli\n"),
        ("runtime/policy/base.py", "from kvq.runtime.native.library import load\n"),  # sideways
        ("runtime/errors.py", "from kvq.runtime.kv import store\n"),  # a cycle, with the good import of store
    ],
)
def test_a_broken_rule_is_found(tmp_path, file, code):
    for name, text in {**GOOD, file: GOOD.get(file, "") + code}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (found,) = broken(tmp_path)
    assert found.startswith(file)


def test_a_plan_that_is_kept_is_not_complained_of(tmp_path):
    for name, text in GOOD.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert broken(tmp_path) == []
