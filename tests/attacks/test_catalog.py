"""Registries, choices, references and histories that nobody of ours wrote: refused by name or left out, at once."""

from __future__ import annotations

import json
import os
import readline

import pytest

from kvq.runtime.catalog.choices import choices
from kvq.runtime.catalog.choices import path as choices_path
from kvq.runtime.catalog.references import default_model, find, known_names, pulled_models
from kvq.runtime.catalog.registry import registry
from kvq.runtime.cli.keyboard import MOST_LINES, History
from kvq.runtime.errors import BundleError, KvqError
from tests.tools.work import bounded_work

LONG = "x" * 500_000


def entry(**changes):
    return {"name": "a", "about": "b", "licence": "c", "sources": [{"hub": "a/b"}]} | changes


def wheel(**changes):
    found = {"pip": "a==1", "sha256": "0" * 64, "nbytes": 1, "member": "a.gguf", "member_sha256": "0" * 64,
             "member_nbytes": 1}  # fmt: skip
    return [entry(sources=[found | changes])]


def listed(models, version=1):
    return json.dumps({"format": "kvq-registry", "format_version": version, "models": models}).encode()


REGISTRIES: dict[str, tuple[bytes, str]] = {
    "a name longer than a file's": (listed([entry(name="a" * 300)]), "name is"),
    "a name of 100,000 characters": (listed([entry(name="a" * 100_000)]), "too long"),
    "a name that is none, of half a megabyte": (listed([entry(name=LONG + "A")]), "too long"),
    "a line of half a megabyte": (listed([entry(about=LONG)]), "too long"),
    "half a surrogate": (listed([entry(about="\ud800")]), "no text"),
    "a licence that turns text around": (listed([entry(licence="a\u202eb")]), "licence of a"),
    "a hub id longer than a path": (listed([entry(sources=[{"hub": "a/" + "b" * 500}])]), "hub of a"),
    "20,000 sources": (listed([entry(sources=[{"hub": "a/b"}] * 20_000)]), "sources of a"),
    "8,000 models": (listed([entry(name=f"a{number}") for number in range(8000)]), "models is"),
    "models of an object": (listed({"a": 1}), "models is"),
    "models of null": (listed(None), "models is"),
    "lists for entries": (listed([[[[]]]]), "an entry is"),
    "an entry of half a megabyte": (listed([LONG]), "an entry is"),
    "a package of 300 letters": (listed(wheel(pip="a" * 300 + "==1")), "pip of a"),
    "a member longer than a file's name": (listed(wheel(member="a" * 400 + ".gguf")), "member of a"),
    "a version of half a megabyte": (listed([], LONG), "too long"),
    "a version of 5,000 digits": (b'{"format": "kvq-registry", "format_version":' + b"9" * 5000 + b"}", "too large"),
    "a shape of 4,000 digits": (listed([entry(shape={"layers": 10**4000, "hidden": 1, "vocab": 1})]), "too large"),
    "a shape of many fields": (listed([entry(shape={str(number): 1 for number in range(1000)})]), "shape of a"),
    "NaN": (listed([entry(sources=[{"hub": "a/b", "nbytes": float("nan")}])]), "no number"),
    "models twice": (b'{"format": "kvq-registry", "format_version": 1, "models": [], "models": []}', "comes twice"),
}


def told(error: KvqError) -> str:
    message = str(error)
    assert message.isprintable(), message
    assert len(message) < 1500, len(message)
    return message


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("KVQ_HOME", str(tmp_path))
    monkeypatch.setenv("KVQ_REGISTRY", str(tmp_path / "registry.json"))
    (tmp_path / "registry.json").write_bytes(listed([entry()]))
    return tmp_path


@pytest.mark.parametrize("name", REGISTRIES)
def test_a_registry_is_refused_by_name(at_home, name):
    data, words = REGISTRIES[name]
    (at_home / "registry.json").write_bytes(data)
    for use in (registry, pulled_models, lambda: find("nothing")):
        with bounded_work(), pytest.raises(BundleError) as caught:
            use()
        assert words in told(caught.value)


def test_a_registry_that_is_a_pipe_is_refused_without_waiting(at_home):
    (at_home / "registry.json").unlink()
    os.mkfifo(at_home / "registry.json")
    with pytest.raises(BundleError, match="no regular file"):
        registry()


def chosen(default=None, **names):
    return json.dumps({"default": default, "names": names}).encode()


CHOICES: dict[str, bytes] = {
    "a path longer than a system's": chosen("n", n="/" + "a" * 5000),
    "a part longer than a file's name": chosen("n", n="/tmp/" + "a" * 300),
    "a path with a zero": chosen("n", n="a\0b"),
    "a path of half a surrogate": chosen("n", n="/\ud800"),
    "a path that moves the cursor": chosen("n", n="/\x1b[2J\n"),
    "a path of a number": chosen("n", n=1),
    "a default of half a surrogate": chosen("\ud800"),
    "a default of a megabyte": chosen("x" * 1_000_000),
    "a default with a zero": chosen("a\0"),
    "a default that moves the cursor": chosen("\x1b[2J\nx"),
    "an empty default": chosen(""),
    "a default of a list": chosen(["x" * 1_000_000]),
    "a name of a megabyte": chosen(None, **{"a" * 1_000_000: "/tmp"}),
    "a name of slashes": chosen(None, **{"/" * 1_000_000: "/tmp"}),
    "names of a list": b'{"default": null, "names": [1]}',
    "50,000 names": chosen(None, **{f"n{number}": "/x" for number in range(50_000)}),
    "a hundred thousand brackets": b"[" * 100_000,
    "a number of 5,000 digits": b'{"default": ' + b"9" * 5000 + b"}",
    "another encoding": '{"default": null, "names": {}}'.encode("utf-16"),
    "zeros": bytes(1_000_000),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_refused_by_name_or_harmless(at_home, name):
    choices_path().write_bytes(CHOICES[name])
    found = choices()
    assert len(found.damage) < 500
    assert found.damage.isprintable()
    for use in (default_model, known_names, lambda: find("n"), lambda: find("nothing")):
        with bounded_work():
            try:
                use()
            except KvqError as error:
                told(error)


REFERENCES = ["\ud800", "a\0b", "x" * 1_000_000, "\x1b[2J", "/" * 5000, "../" * 4000, "a/" + "b" * 300, "",
              "/dev/zero", "/dev/null.gguf", "a\nb", "a/\udcff", "-", "~", ".", "a" * 256, "//host/share", "C:\\x",
              "http://127.0.0.1:1/x", "a/b/c", "\u202e", " "]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFERENCES)))
def test_a_reference_is_refused_by_name_or_a_folder(at_home, number):
    with bounded_work():
        try:
            found = find(REFERENCES[number])
        except KvqError as error:
            told(error)
        else:
            assert found.origin in ("folder", "hub")


# -> how many entries are taken of it
HISTORIES: dict[str, tuple[bytes, int]] = {
    "half a surrogate": (b'"\\ud800"\n', 0),
    "more than is kept": ((b'"' + b"a" * 3990 + b'"\n') * 3000, MOST_LINES),
    "a line of eight megabytes": (b'"' + b"a" * 8_000_000 + b'"\n', 0),
    "a text that moves the cursor": (b'"\\u001b[2J"\n', 1),
    "zeros": (bytes(1_000_000), 0),
    "a hundred thousand brackets": (b"[" * 100_000 + b"\n", 0),
    "a number of 6,000 digits": (b"9" * 6000 + b"\n", 0),
    "NaN": (b"NaN\n", 0),
    "several lines in one": (b'"a\\nb"\n', 1),
    "every byte": (bytes(range(256)) * 1000, 0),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_of_a_history_entries_are_taken_and_the_rest_is_left_out(tmp_path, name):
    data, count = HISTORIES[name]
    history = History(tmp_path / "history")
    history.path.write_bytes(data)
    with bounded_work():
        entries = history.entries()
        for each in entries:
            readline.add_history(each)  # what a chat does with them
        history.add("newest")
    readline.clear_history()
    assert len(entries) == count
    if not data.endswith(b"\n"):
        history.add("newer")
    assert history.entries()[-1].startswith("newe")


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "hole"])
def test_a_history_that_is_no_file_or_has_no_end_holds_nothing_up(tmp_path, kind):
    path = tmp_path / "history"
    (tmp_path / "aim").write_bytes(b'"of another"\n')
    if kind == "hole":
        path.write_bytes(b"")
        os.truncate(path, 1 << 40)
    else:
        {"link": lambda: path.symlink_to(tmp_path / "aim"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[
            kind
        ]()
    with bounded_work():
        assert History(path).entries() == []
        if kind != "hole":
            History(path).add("newest")
    assert (tmp_path / "aim").read_bytes() == b'"of another"\n'
