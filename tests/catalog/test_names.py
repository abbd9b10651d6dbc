"""What models are called: the default, the user's own names, checkpoints on this machine; list, show and rm."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvq
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.catalog import checkpoints, references
from kvq.runtime.errors import HubError
from tests.tools.command_line import assert_one_line_error, command
from tests.tools.command_line import kvq as process
from tests.tools.shelf import GGUF, here, one_line, tree, without

HINT = "kvq: using kvq-books, an offline model trained on novels; kvq pull smollm2-135m-instruct fetches a real one"
SHORT = ["run", "-n", "1", "Hello"]


@pytest.mark.slow
def test_with_nothing_chosen_one_line_says_how_to_get_a_real_model(tiny_bundle):
    done = process(*SHORT)
    assert done.returncode == 0
    assert done.stderr.startswith(f"{HINT} (93 MB)\n")
    assert done.stderr.count("\n") == 2
    for arguments, env in (
        ([*SHORT, "-q"], {}), ([*SHORT, "--json"], {}), ([*SHORT, "-m", "kvq-books"], {}),
        (SHORT, {"KVQ_MODEL": "kvq-books"}), (SHORT, {"KVQ_QUIET": "1"}),
    ):  # fmt: skip
        done = process(*arguments, env=env)
        assert done.returncode == 0
        assert "novels" not in done.stderr


@pytest.mark.slow
def test_the_default_is_what_use_says_and_flag_and_variable_go_before_it(own_home, tiny_bundle, tmp_path):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "mine")
    assert process("use").stdout == "kvq-books\n"
    done = process("use", str(bundle))
    assert (done.returncode, done.stdout) == (0, f"{bundle} is the default now\n")
    assert process("use").stdout == f"{bundle}\n"
    assert kvq.load().path == bundle

    def ran(*arguments, env=None):
        done = process("inspect", "--json", *arguments, "Hello", env=env)
        return json.loads(done.stdout)["stats"] if done.returncode == 0 else pytest.fail(done.stderr)

    small, books = ran("-m", str(bundle)), ran("-m", "kvq-books")
    key = next(name for name in small if small[name] != books[name] and "nbytes" in name)
    assert ran()[key] == small[key]
    assert ran("-m", "kvq-books")[key] == books[key]
    assert ran(env={"KVQ_MODEL": "kvq-books"})[key] == books[key]
    shutil.rmtree(bundle)
    done = process(*SHORT, "-q")
    assert_one_line_error(done, f"the default model {bundle} is no longer here", "kvq use NAME chooses another")
    assert process("list").returncode == 0
    assert process("use", "kvq-books").returncode == 0
    done = process(*SHORT)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)  # it was chosen, so nothing is said of it


def test_use_takes_only_what_is_here(shelf, tmp_path, capsys):
    one_line(here(capsys, "use", "tiny-instruct"), "is not here yet; kvq pull tiny-instruct fetches it")
    one_line(here(capsys, "use", "someone/model"), "kvq pull someone/model")
    (tmp_path / "a.gguf").write_bytes(GGUF)
    one_line(here(capsys, "use", tmp_path / "a.gguf"), f"kvq name {tmp_path / 'a.gguf'} NAME exports it")
    (tmp_path / "empty").mkdir()
    one_line(here(capsys, "use", tmp_path / "empty"), "is no bundle that can be used")
    one_line(here(capsys, "use", "nothing"), "no model 'nothing'")
    assert references.default_model()[0] == "kvq-books"


DAMAGED = [
    b"", b"\xff", b"{", b"[]", b"{}", b'{"default": 1, "names": {}}', b'{"default": null, "names": []}',
    b'{"default": null, "names": {"../x": "y"}}', b'{"default": null, "names": {"x": 1}}', b"[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("data", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_of_choices_is_a_named_error_and_is_written_anew(own_home, capsys, data):
    own_home.mkdir()
    (own_home / "choices.json").write_bytes(data)
    one_line(here(capsys, *SHORT), "choices.json is damaged", "kvq use NAME writes it anew", "-m NAME goes without it")
    assert here(capsys, *SHORT, "-q", "-m", "kvq-books")[0] == 0
    one_line(here(capsys, *SHORT, "-m", "mine"), "no model 'mine'", "choices.json is damaged")
    code, _, err = here(capsys, "list")
    assert (code, err.count("\n")) == (0, 1)
    code, _, err = here(capsys, "use", "kvq-books")
    assert (code, err.count("\n")) == (0, 1)
    assert here(capsys, *SHORT, "-q")[0] == 0


def test_a_name_stands_for_a_folder(own_home, tiny_bundle, tmp_path, capsys):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "mine")
    assert here(capsys, "name", bundle, "small") == (0, f"small is {bundle}\n", "")
    assert kvq.load("small").path == bundle
    assert here(capsys, "use", "small")[0] == 0
    rows = [json.loads(text) for text in here(capsys, "list", "--json")[1].splitlines()]
    assert [row["model"] for row in rows if row["default"]] == ["small"]
    assert [(row["from"], row["path"]) for row in rows if row["model"] == "small"] == [("named", str(bundle))]
    code, out, _ = here(capsys, "rm", "small", "--yes")
    assert (code, out) == (
        0, f"small is forgotten; {bundle} stays; it was the default, which is the embedded model again\n",
    )  # fmt: skip
    assert bundle.is_dir()
    assert references.default_model()[0] == "kvq-books"
    here(capsys, "name", bundle, "small")
    shutil.rmtree(bundle)
    one_line(here(capsys, *SHORT, "-m", "small"), f"small stands for {bundle}, which is gone", "kvq rm small")
    assert here(capsys, "rm", "small", "-y")[0] == 0


@pytest.mark.parametrize("name", ["kvq-books", "SmolLM2-135M-instruct", "a/b", "..", "", "a b", "-", "a\n"])
def test_a_name_that_cannot_be_had_is_refused(own_home, tiny_bundle, capsys, name):
    code, out, err = here(capsys, "name", tiny_bundle, "--", name)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert not tree(own_home)


@pytest.mark.slow
def test_rm_removes_what_was_pulled_and_resets_the_default(shelf, own_home, capsys):
    here(capsys, "pull", "tiny-instruct")
    here(capsys, "name", "tiny-instruct", "mine")
    one_line(here(capsys, "rm", "tiny-instruct"), "only with --yes")
    assert kvq.load("mine")
    code, out, err = here(capsys, "rm", "--yes", "TINY-instruct")
    assert (code, err) == (0, "")
    assert out.endswith(
        "is removed; the name mine with it; it was the default, which is the embedded model again\n"
    )  # fmt: skip
    assert tree(own_home) == {"models", "choices.json"}
    one_line(here(capsys, "rm", "-y", "tiny-instruct"), "no model 'tiny-instruct' in the cache")


def test_rm_removes_damaged_models_and_owners_left_alone(own_home, tiny_bundle, capsys):
    for name in ("one", "two"):
        shutil.copytree(tiny_bundle, own_home / "models" / "someone" / name)
    (own_home / "models" / "someone" / "one" / "kvq.json").unlink()
    assert here(capsys, "rm", "-y", "someone/one")[0] == 0
    assert os.listdir(own_home / "models" / "someone") == ["two"]
    assert here(capsys, "rm", "-y", "someone/two")[0] == 0
    assert os.listdir(own_home / "models") == []


def test_rm_never_touches_what_is_outside(own_home, tiny_bundle, tmp_path, capsys, monkeypatch):
    outside = shutil.copytree(tiny_bundle, tmp_path / "outside")
    before = tree(outside)
    one_line(here(capsys, "rm", "-y", "kvq-books"), "is embedded", "cannot be removed")
    one_line(here(capsys, "rm", "-y", outside), "is not in the cache")
    (own_home / "models" / "owner").mkdir(parents=True)
    for reference in ("../outside", "owner/..", "..", ".", "/", "", "owner/../../../outside", "models"):
        assert here(capsys, "rm", "-y", "--", reference)[0] == 1, reference
    (own_home / "models" / "someone").symlink_to(tmp_path)
    one_line(here(capsys, "rm", "-y", "someone/outside"), "nothing outside of it is removed")
    (own_home / "models" / "owner" / "link").symlink_to(outside)
    assert here(capsys, "rm", "-y", "owner/link")[0] == 0
    assert not (own_home / "models" / "owner").exists()
    assert tree(outside) == before


@pytest.mark.slow
def test_models_may_lie_on_another_disk(shelf, own_home, tmp_path, capsys):
    (tmp_path / "disk" / ".x.partial-abcdefgh").mkdir(parents=True)
    own_home.mkdir()
    (own_home / "models").symlink_to(tmp_path / "disk")
    assert here(capsys, "pull", "tiny-instruct")[0] == 0
    assert os.listdir(tmp_path / "disk") == ["tiny-instruct"]
    assert here(capsys, "rm", "-y", "tiny-instruct")[0] == 0
    assert os.listdir(tmp_path / "disk") == []


@pytest.mark.slow
def test_rm_of_an_export_takes_its_path_or_its_name(shelf, own_home, tmp_path, capsys):
    model = tmp_path / "a.gguf"
    model.write_bytes(GGUF)
    assert here(capsys, "name", model, "mine")[0] == 0
    assert here(capsys, "name", "mine", "too")[0] == 0
    assert here(capsys, "use", model)[0] == 0
    rows = [json.loads(text) for text in here(capsys, "list", "--json")[1].splitlines()]
    assert {(row["model"], row["from"]) for row in rows if row["default"]} == {
        (str(model), "local"), ("mine", "named"), ("too", "named"),
    }  # fmt: skip
    folder = next(Path(row["path"]) for row in rows if row["model"] == "mine")
    assert here(capsys, "rm", "-y", "too")[0] == 0
    assert folder.is_dir()
    assert here(capsys, "rm", "-y", "mine")[0] == 0
    assert not folder.exists()
    assert references.default_model()[0] == "kvq-books"
    assert references.locate(str(model)) == folder
    model.unlink()
    assert here(capsys, "rm", "-y", folder)[0] == 0
    assert not folder.exists()


@pytest.mark.slow
def test_rm_asks_on_a_terminal(own_home, tiny_bundle):
    pty = pytest.importorskip("pty")
    shutil.copytree(tiny_bundle, own_home / "models" / "someone" / "one")
    for answer, code in ((b"n\n", 130), (b"y\n", 0)):
        ours, theirs = pty.openpty()
        os.write(ours, answer)
        arguments = [sys.executable, "-m", "kvq", "rm", "someone/one"]
        done = subprocess.run(arguments, stdin=theirs, capture_output=True, text=True, timeout=60)
        os.close(ours)
        os.close(theirs)
        assert done.returncode == code, done.stderr
        assert "Remove" in done.stderr
        assert (own_home / "models" / "someone" / "one").exists() == (code != 0)


@pytest.mark.slow
def test_list_says_what_is_here_and_what_can_be_fetched(shelf, capsys):
    here(capsys, "pull", "tiny-instruct")
    code, out, err = here(capsys, "list")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert ["*", "tiny-instruct", "pulled"] in [text.split()[:3] for text in lines]
    at = lines.index("to be fetched with kvq pull:")
    assert [text.split() for text in lines[at + 1 :]] == [["other-base", "size", "unknown", "Another"]]
    rows = {row["model"]: row for row in map(json.loads, here(capsys, "list", "--json")[1].splitlines())}
    assert rows["other-base"] == {
        "model": "other-base", "from": "registry", "default": False, "download_nbytes": None, "about": "Another",
        "licence": "MIT",
    }  # fmt: skip
    assert rows["tiny-instruct"]["default"]


@pytest.mark.slow
def test_show_tells_all_of_a_model_and_how_to_get_one(shelf, capsys, tiny_bundle):
    code, out, _ = here(capsys, "show", "tiny-instruct")
    assert code == 0
    assert "from kvq-shelf==1.0, then the hub's someone/tiny" in out
    assert "not here yet: kvq pull tiny-instruct" in out
    assert json.loads(here(capsys, "show", "tiny-instruct", "--json")[1])["here"] is False
    here(capsys, "pull", "tiny-instruct")
    row = json.loads(here(capsys, "show", "tiny-instruct", "--json")[1])
    manifest = Bundle(tiny_bundle).manifest
    shape = manifest.architecture
    assert row["digest"] == manifest.model_digest
    assert (row["licence"], row["here"], row["chat_template"]) == ("MIT", True, "chat_template.jinja" in manifest.files)
    vectors = 2 * shape.layers * shape.kv_heads
    assert row["kv_token_nbytes"]["fp16"] == vectors * shape.head_dim * 2 + 4
    assert row["kv_token_nbytes"]["int4"] == vectors * (shape.head_dim // 2 + 2) + 4
    code, out, _ = here(capsys, "show", "tiny-instruct")
    for word in ("licence      MIT", f"context {shape.context}", "layers fp32", f"digest       {row['digest']}"):
        assert word in out
    assert here(capsys, "show", "kvq-books")[0] == 0
    assert here(capsys, "show", tiny_bundle)[0] == 0
    one_line(here(capsys, "show", "someone/model"), "kvq pull someone/model fetches it")


def test_what_is_close_to_an_unknown_name_is_suggested(capsys):
    one_line(here(capsys, *SHORT, "-m", "SmolLM2-136M-instruct"), "did you mean ", "smollm2-135m-instruct")
    one_line(here(capsys, *SHORT, "-m", "zzz"), "there are kvq-books, smollm2-135m, ", "kvq list")
    one_line(here(capsys, *SHORT, "-m", "folder/gone.gguf"), "no model 'folder/gone.gguf'")


@pytest.mark.parametrize("words", ["run -m", "pull", "show", "use", "rm"])
def test_a_name_completes(words):
    env = {"COMP_WORDS": f"kvq {words} smollm2-360", "COMP_CWORD": str(len(words.split()) + 1)}
    code = "import sys; sys.argv = ['kvq']; from kvq.runtime.cli import main; main.main()"
    done = command([sys.executable, "-c", code], env={**env, "_KVQ_COMPLETE": "bash_complete"})
    assert done.stdout.split() == ["plain,smollm2-360m", "plain,smollm2-360m-instruct"]


@pytest.mark.slow
def test_a_checkpoint_or_gguf_file_is_exported_once_by_its_content(shelf, own_home, tmp_path):
    model = tmp_path / "Small.Q8_0.gguf"
    model.write_bytes(GGUF)
    told = []
    path = references.locate(str(model), notice=told.append)
    assert path == own_home / "exports" / hashlib.sha256(GGUF).hexdigest()
    assert told == ["exporting Small.Q8_0, once"]
    os.utime(model, (1, 1))
    (tmp_path / "copy.gguf").write_bytes(GGUF)
    assert {references.locate(str(model)), references.locate(str(tmp_path / "copy.gguf"))} == {path}
    assert shelf.exports == ["Small.Q8_0"]
    (own_home / "exports" / "index.json").write_text("damaged")
    assert references.locate(str(model)) == path
    model.write_bytes(GGUF[::-1])
    with pytest.raises(kvq.CheckpointError):  # the exporter here knows only the first one
        references.locate(str(model))
    assert set(os.listdir(own_home / "exports")) == {path.name, "index.json"}


def test_an_unchanged_checkpoint_is_not_read_again(shelf, tmp_path, monkeypatch):
    model = tmp_path / "a.gguf"
    model.write_bytes(GGUF)
    references.locate(str(model))
    monkeypatch.setattr(checkpoints, "digest", lambda path: pytest.fail("was read"))
    assert references.locate(str(model))


@pytest.mark.slow
def test_a_checkpoint_folder_is_a_model(own_home, tiny_checkpoint, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "mine")
    model = kvq.load(folder)
    assert model.path.parent == own_home / "exports"
    assert model.bundle.manifest.name == "mine"
    (folder / "notes.txt").write_text("not part of it")
    assert kvq.load(folder).path == model.path
    without(monkeypatch, "onnx")
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    with pytest.raises(HubError, match="needs onnx"):
        kvq.load(folder)
