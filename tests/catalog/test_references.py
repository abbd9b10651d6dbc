"""What -m and kvq.load take: embedded names, folders and hub ids, with a hub that is a folder here."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest

import kvq
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.bundle.manifest import MANIFEST
from kvq.runtime.catalog import references
from kvq.runtime.catalog.home import home
from tests.tools.command_line import assert_one_line_error
from tests.tools.command_line import kvq as command
from tests.tools.packages import needs


@pytest.fixture
def hub(tmp_path, monkeypatch, tiny_bundle, tiny_checkpoint):
    """snapshot_download from a folder, laid out as huggingface_hub's cache: links to blobs. Records its calls."""
    huggingface_hub = needs("huggingface_hub")
    calls = []

    def snapshot_download(repo_id, *, allow_patterns, local_files_only=False):
        calls.append((repo_id, tuple(allow_patterns), local_files_only))
        source = tmp_path / "hub" / repo_id
        target = tmp_path / "cache" / repo_id
        if not (target if local_files_only else source).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find the\nsnapshot")
        target.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                (target / file.name).unlink(missing_ok=True)
                (target / file.name).symlink_to(file)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    shutil.copytree(tiny_bundle, tmp_path / "hub" / "someone" / "bundle")
    shutil.copytree(tiny_checkpoint, tmp_path / "hub" / "someone" / "checkpoint")
    (tmp_path / "hub" / "someone" / "bundle" / "README.md").write_text("not part of it")
    return calls


def test_a_bundle_by_hub_id_is_fetched_once_and_kept(hub, own_home, tiny_bundle):
    folder = references.locate("someone/bundle")
    assert folder == own_home / "models" / "someone" / "bundle"
    assert not any(file.is_symlink() for file in folder.iterdir())
    assert Bundle(folder).digest == Bundle(tiny_bundle).digest
    assert not (folder / "README.md").exists()
    assert hub
    hub.clear()
    model = kvq.load("someone/bundle")
    assert model.path == folder
    assert not hub
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


@pytest.mark.slow
def test_a_checkpoint_by_hub_id_is_exported_once_and_kept(hub, own_home):
    told = []
    model = kvq.load("someone/checkpoint", notice=told.append)
    assert model.bundle.manifest.name == "someone/checkpoint"
    assert told == ["fetching someone/checkpoint from the hub, once", "exporting someone/checkpoint, once"]
    assert not any("*.bin" in pattern for _, patterns, _ in hub for pattern in patterns)
    hub.clear()
    assert kvq.load("someone/checkpoint", offline=True).path == model.path
    assert not hub


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_exported_is_the_exporters_error(hub, tmp_path, own_home):
    config = tmp_path / "hub" / "someone" / "checkpoint" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "gpt2"}))
    with pytest.raises(kvq.CheckpointError, match="model_type 'gpt2'"):
        kvq.load("someone/checkpoint")
    assert not references.cached_models()
    assert not list((own_home / "models" / "someone").iterdir())


@pytest.mark.parametrize("offline", [None, True])
def test_offline_uses_what_is_here_and_says_what_is_missing(hub, monkeypatch, offline):
    references.locate("someone/bundle")
    hub.clear()
    if offline is None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert references.locate("someone/bundle", offline=offline)
    with pytest.raises(
        kvq.HubError,
        match=r"checkpoint is not on this machine.*--offline or HF_HUB_OFFLINE.*kvq pull someone/checkpoint --from",
    ):
        references.locate("someone/checkpoint", offline=offline)
    assert all(local for _, _, local in hub)


def test_what_the_hub_does_not_have_is_one_line(hub):
    with pytest.raises(kvq.HubError, match="cannot be fetched from the hub") as caught:
        references.locate("someone/nothing")
    assert "\n" not in str(caught.value)


def test_an_incomplete_or_damaged_bundle_is_refused_and_not_kept(hub, tmp_path):
    folder = tmp_path / "hub" / "someone" / "bundle"
    weights = folder / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[9] ^= 1
    weights.write_bytes(data)
    with pytest.raises(kvq.BundleError, match="sha256"):
        references.locate("someone/bundle")
    weights.unlink()
    (tmp_path / "cache" / "someone" / "bundle" / "weights.bin").unlink()
    with pytest.raises(kvq.BundleError, match=r"lacks weights\.bin"):
        references.locate("someone/bundle")
    (folder / MANIFEST).write_bytes(b"\xff")
    with pytest.raises(kvq.BundleError, match="UTF-8"):
        references.locate("someone/bundle")
    assert not references.cached_models()


@pytest.mark.parametrize(
    ("missing", "reference", "extra"),
    [("huggingface_hub", "someone/bundle", "hub"), ("onnx", "someone/checkpoint", "export")],
)
def test_a_missing_package_is_named_with_its_extra(hub, monkeypatch, missing, reference, extra):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(kvq.HubError, match=rf"needs {missing}: pip install 'kvq-run\[{extra}\]', in a checkout '\."):
        references.locate(reference)


def test_a_folder_that_cannot_be_written_is_named(hub, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVQ_HOME", str(tmp_path / "file"))
    with pytest.raises(kvq.HubError, match="set KVQ_HOME"):
        references.locate("someone/bundle")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert home() == tmp_path / "home"
    monkeypatch.delenv("KVQ_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert home() == tmp_path / "xdg" / "kvq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".cache" / "kvq"


def test_a_folder_goes_before_a_hub_id_and_an_embedded_name_before_a_folder(hub, tmp_path, monkeypatch, tiny_bundle):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_bundle, "someone/bundle")
    Path("kvq-books").mkdir()
    assert references.locate("someone/bundle") == Path("someone/bundle")
    Path("smollm-135m").mkdir()
    with pytest.raises(kvq.HubError, match="smollm-135m cannot be fetched"):
        references.locate("smollm-135m")
    assert references.locate("./smollm-135m") == Path("./smollm-135m")
    assert {repository for repository, *_ in hub} == {"HuggingFaceTB/SmolLM-135M"}
    hub.clear()
    assert references.locate("kvq-books") == references.embedded_models()["kvq-books"]
    assert references.locate("./kvq-books") == Path("./kvq-books")
    assert not hub


def test_a_hub_model_that_was_fetched_goes_before_a_folder(hub, tmp_path, monkeypatch, tiny_bundle):
    """What a command means does not depend on where it is given: a folder that came with a download is not taken."""
    kept = home() / "models" / "someone" / "bundle"
    shutil.copytree(tiny_bundle, kept)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_bundle, "someone/bundle")
    told = []
    assert references.locate("someone/bundle", notice=told.append) == kept
    assert told == ["someone/bundle is the model of that name; say ./someone/bundle for the folder"]
    assert references.locate("./someone/bundle") == Path("./someone/bundle")
    assert not hub


@pytest.mark.parametrize("reference", ["no-such", "a/b/c", "../x/y", "/a/b", "a/.b", "-x/y", "", "a/b\n"])
def test_what_is_no_reference_is_never_asked_of_the_hub(hub, reference):
    with pytest.raises(kvq.BundleError, match="kvq export"):
        references.locate(reference)
    assert not hub


@pytest.mark.slow
def test_list_shows_embedded_and_fetched_models(own_home, tiny_bundle):
    for name in ("good", "bad"):
        shutil.copytree(tiny_bundle, own_home / "models" / "someone" / name)
    (own_home / "models" / "someone" / "bad" / MANIFEST).write_text("{}")
    done = command("list")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["model", "from", "size", "weights", "context", "controllers"]
    assert ["*", "kvq-books", "embedded", "14.5", "MB", "int8", "2048", "adaptive,", "paper"] in lines
    assert ["someone/good", "hub", "fp32", "256", "none"] in [line[:2] + line[4:] for line in lines]
    assert any(line[:3] == ["someone/bad", "hub", "damaged:"] for line in lines)
    rows = {row["model"]: row for row in map(json.loads, command("list", "--json").stdout.splitlines())}
    assert rows["kvq-books"]["controllers"] == ["adaptive", "paper"]
    assert rows["someone/good"]["path"] == str(own_home / "models" / "someone" / "good")
    assert "error" in rows["someone/bad"]
    size = sum(file.stat().st_size for file in Path(rows["someone/good"]["path"]).iterdir())
    assert rows["someone/good"]["nbytes"] == size - (Path(rows["someone/good"]["path"]) / MANIFEST).stat().st_size


@pytest.mark.slow
def test_offline_on_the_command_line_is_one_line(own_home):
    needs("huggingface_hub")
    for arguments, env in ((["--offline"], {}), ([], {"HF_HUB_OFFLINE": "1"}), ([], {"KVQ_OFFLINE": "1"})):
        done = command("run", "-m", "someone/nothing", *arguments, "Hello", env=env)
        assert_one_line_error(done, "someone/nothing is not on this machine", "--offline or HF_HUB_OFFLINE")


def test_a_fetched_model_runs_by_its_hub_id(own_home, tiny_bundle):
    shutil.copytree(tiny_bundle, own_home / "models" / "someone" / "model")
    done = command("run", "-q", "-n", "2", "--offline", "Hello", env={"KVQ_MODEL": "someone/model"})
    assert (done.returncode, done.stderr) == (0, "")
    assert os.path.isdir(own_home)
