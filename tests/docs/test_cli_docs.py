"""Flags and what is said of them: environment twins, help, docs/cli.md, shell completion."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import click
import pytest

from kvq.runtime.cli.docs import document, entered, helps
from kvq.runtime.cli.main import COMMANDS, group
from tests.tools.command_line import command, kvq, run
from tests.tools.tree import ROOT


def leaves(found: click.Command, context: click.Context, path: str = ""):
    if not isinstance(found, click.Group):
        yield path, found
        return
    for name in found.list_commands(context):
        yield from leaves(found.get_command(context, name), context, f"{path} {name}".strip())


CONTEXT = entered(group, "kvq")


def test_docs_cli_is_what_the_help_says():
    """After a change of commands or flags: python -m kvq.runtime.cli.docs > docs/cli.md"""
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == document()


def test_every_flag_has_one_twin_whatever_the_command():
    for path, found in leaves(group, CONTEXT):
        for parameter in found.params:
            if isinstance(parameter, click.Option) and parameter.name not in ("help", "version"):
                long = next(name for name in parameter.opts if name.startswith("--"))
                expected = "KVQ_" + long[2:].replace("-", "_").upper()
                if path.startswith("eval") and long == "--json":  # a file there, a switch elsewhere
                    expected = "KVQ_JSON_FILE"
                assert parameter.envvar == expected, path


def test_no_variable_is_a_switch_here_and_a_value_there():
    kinds: dict[str, set[bool]] = {}
    for _, found in leaves(group, CONTEXT):
        for parameter in found.params:
            if isinstance(parameter, click.Option) and parameter.envvar is not None:
                kinds.setdefault(str(parameter.envvar), set()).add(parameter.is_flag)
    assert all(len(found) == 1 for found in kinds.values()), kinds


@pytest.mark.slow
def test_a_variable_sets_a_flag_and_the_flag_beats_it(tiny_bundle):
    env = {
        "KVQ_MODEL": str(tiny_bundle), "KVQ_POLICY": "int4", "KVQ_MAX_TOKENS": "5", "KVQ_RECENT": "3", "KVQ_SINK": "1",
        "KVQ_THREADS": "1", "KVQ_BACKEND": "numpy", "KVQ_JSON": "1", "KVQ_SEED": "4", "KVQ_IGNORE_EOS": "1",
    }  # fmt: skip
    found = json.loads(kvq("run", "Hello", env=env).stdout)
    stats = found["stats"]
    assert (found["tokens"], stats["policy"], stats["recent"], stats["sink"]) == (5, "int4", 3, 1)
    assert (stats["threads"], stats["backend"]) == (1, "numpy")
    found = json.loads(kvq("run", "-n", "7", "-p", "int8", "--recent", "2", "Hello", env=env).stdout)
    assert (found["tokens"], found["stats"]["policy"], found["stats"]["recent"]) == (7, "int8", 2)


@pytest.mark.slow
def test_a_stop_string_in_the_environment_keeps_its_blanks(tiny_bundle):
    arguments = ["--json", "-t", "1", "-s", "2", "-n", "40", "Hello"]
    whole = json.loads(run(tiny_bundle, *arguments).stdout)["text"]
    stop = next(whole[at - 1 : at + 2] for at in range(2, len(whole)) if whole[at] in " \n")
    cut = json.loads(
        run(tiny_bundle, "--json", "-t", "1", "-s", "2", "-n", "40", "Hello", env={"KVQ_STOP": stop}).stdout
    )
    assert cut["text"] == whole[: whole.index(stop)]


@pytest.mark.slow
def test_a_wrong_value_names_the_variable_it_came_from(tiny_bundle):
    done = run(tiny_bundle, "Hello", env={"KVQ_THREADS": "many"})
    assert done.returncode == 2
    assert "'many' is not a valid integer (from KVQ_THREADS; see kvq run --help)\n" in done.stderr
    done = run(tiny_bundle, "--threads", "many", "Hello", env={"KVQ_THREADS": "1"})
    assert "KVQ_THREADS" not in done.stderr


def test_help_is_80_columns_wide_with_examples_and_the_twins():
    for name, text in helps(group, CONTEXT):
        assert max(map(len, text.splitlines())) <= 80, name
    for path, found in leaves(group, CONTEXT):
        text = found.get_help(entered(found, path, CONTEXT))
        assert "Every flag has an environment twin" in text, path
        if path in ("run", "chat", "list", "export", "completion", "train-controller"):
            assert "Example" in text, path


def test_the_flags_of_run_stand_in_sections():
    text = kvq("run", "-h").stdout
    titles = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Basics", "Model", "Cache", "Structure", "Sampling", "Options"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_code_is_valid_and_covers_both_scripts(shell):
    if shutil.which(shell) is None and shell == "bash":
        pytest.skip("click asks bash for its version")
    code = kvq("completion", shell).stdout
    for variable in ("_KVQ_COMPLETE", "_KVQ_RUN_COMPLETE"):
        assert variable in code
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=code, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("kvq ", set(COMMANDS)),
        ("kvq ch", {"chat"}),
        ("kvq run --kv", {"--kv-bits", "--kv-memory"}),
        ("kvq chat -p int", {"int2", "int3", "int4", "int8"}),
        ("kvq run -m kvq", {"kvq-books"}),
        ("kvq-run -p ada", {"adaptive"}),
    ],
)
def test_completion_knows_commands_flags_policies_and_models(words, expected, tmp_path):
    program, *rest = words.split(" ")
    code = (
        f"import sys; sys.argv = [{program!r}]\nfrom kvq.runtime.cli import main\n"
        f"main.{'main' if program == 'kvq' else 'run_main'}()"
    )
    variable = "_KVQ_COMPLETE" if program == "kvq" else "_KVQ_RUN_COMPLETE"
    env = {"COMP_WORDS": words, "COMP_CWORD": str(len(rest)), variable: "bash_complete", "KVQ_HOME": str(tmp_path)}
    done = command([sys.executable, "-c", code], env=env)
    assert {line.split(",")[1] for line in done.stdout.splitlines()} == expected, done.stderr
