"""--context-shift on the command line."""

from __future__ import annotations

import json

import pytest

from tests.tools.command_line import assert_one_line_error, kvq

pytestmark = pytest.mark.slow
PROMPT = "The ship left the harbour in the morning. " * 4


def asked(bundle, *arguments, count=200):
    done = kvq("run", "-m", bundle, "-n", str(count), "-t", "0", "--ignore-eos", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_run_goes_on_where_the_context_is_full(tiny_bundle, tiny_model, tmp_path):
    path = tmp_path / "story.kvq"
    full = asked(tiny_bundle, PROMPT)
    assert full["finish_reason"] == "context"
    assert full["stats"]["context_shifts"] == 0
    found = asked(tiny_bundle, PROMPT, "--context-shift", "--session", path, count=240)
    assert (found["finish_reason"], found["tokens"]) == ("length", 240)
    session = tiny_model.session("int8")
    options = {"max_tokens": 240, "temperature": 0, "ignore_eos": True, "context_shift": True}
    assert found["text"] == "".join(response.text for response in session.generate(PROMPT, **options))
    assert found["text"].startswith(full["text"][:40])
    for name in ("context_shifts", "shifted_tokens"):
        assert found["stats"][name] == getattr(session.stats(), name) > 0
    # The saved session goes on, with another prompt that does not fit any more.
    more = kvq("run", "-m", tiny_bundle, "-n", "5", "-t", "0", "--ignore-eos", "--session", path, "--context-shift",
               PROMPT * 2)  # fmt: skip
    assert more.returncode == 0, more.stderr
    assert "context full once" in more.stderr
    refused = kvq("run", "-m", tiny_bundle, "-n", "5", "-q", "--session", path, PROMPT * 2)
    assert_one_line_error(refused, "do not fit into the context of 256")
