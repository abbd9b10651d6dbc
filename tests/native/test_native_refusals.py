"""What the native backend refuses: graphs without their pass, foreign graphs, libraries that do not fit."""

from __future__ import annotations

import _ctypes
import ctypes
import re
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest

from kvq.runtime.compute.backends import make_backend
from kvq.runtime.errors import BackendError, NonFiniteError
from kvq.runtime.native import library
from tests.native.test_native import IDS, KERNELS
from tests.native.test_native_operators import session_of

# The decoder graph names no memory: it works on the pass that its own thread has set, and on no other.


@pytest.fixture
def native_pass(tiny_model):
    """A pass of two tokens beside a session that holds some."""
    session = tiny_model.session(backend="native")
    session.append(IDS[:20])
    return session, session.backend.forward_pass(tiny_model.engine, 2)


def assert_still_works(session, forward):
    forward.forward(np.array(IDS[20:22]), session.store)
    assert np.isfinite(forward.residual).all()


def test_the_decoder_does_not_run_without_a_pass(native_pass):
    session, forward = native_pass
    with pytest.raises(Exception, match="no session has set a pass"):
        forward._graph.run()
    assert_still_works(session, forward)
    with pytest.raises(Exception, match="no session has set a pass"):  # and the last pass was taken away
        forward._graph.run()


def test_a_pass_is_not_seen_by_another_thread(native_pass):
    session, forward = native_pass
    said = []

    def other():
        try:
            forward._graph.run()
        except Exception as error:
            said.append(str(error))

    library.load().kvq_set_pass(ctypes.byref(forward._span.given))
    try:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    finally:
        library.load().kvq_set_pass(None)
    assert len(said) == 1
    assert "no session has set a pass" in said[0]
    assert_still_works(session, forward)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tokens", 1, "shape"),
        ("tokens", 3, "shape"),
        ("heads", 16, "shape"),
        ("kv_heads", 2, "shape"),
        ("head_dim", 16, "shape"),
        ("layers", 1, "layer"),
        ("layers", 0, "layer"),
    ],
)
def test_a_graph_that_does_not_fit_the_pass_is_refused(native_pass, field, value, message):
    session, forward = native_pass
    true = getattr(forward._span.given, field)
    setattr(forward._span.given, field, value)
    with pytest.raises(Exception, match=message):
        forward.forward(np.array(IDS[20:22]), session.store)
    setattr(forward._span.given, field, true)
    assert_still_works(session, forward)


def foreign_graph(layer):
    """A session of one attention node."""
    names = ["qkv", "cosine", "sine", "mean_key"]
    return session_of([onnx.helper.make_node("Attention", names, ["out"], domain="kvq", layer=layer, rotate=1)], names)


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (-1, {}),
        (3, {}),
        (2**40, {}),
        (0, {"qkv": (2, 8)}),
        (0, {"qkv": (0, 128)}),
        (0, {"qkv": (3, 16, 8)}),
        (0, {"qkv": ()}),
        (0, {"cosine": (2, 3)}),
        (0, {"sine": (1, 4)}),
        (0, {"mean_key": (8, 3)}),
        (0, {"mean_key": ()}),
    ],
)
def test_a_foreign_graph_with_inputs_of_wrong_sizes_reads_nothing(tiny_model, native_pass, layer, shapes):
    session, forward = native_pass
    shape = tiny_model.architecture
    wide = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    half = shape.head_dim // 2
    fitting = {"qkv": (2, wide), "cosine": (2, half), "sine": (2, half), "mean_key": (shape.kv_heads, shape.head_dim)}
    feed = {name: np.ones(size, np.float32) for name, size in (fitting | shapes).items()}
    graph = foreign_graph(layer)
    with pytest.raises(Exception, match="kvq"):
        graph.run(None, feed)  # no pass at all
    library.load().kvq_set_pass(ctypes.byref(forward._span.given))
    try:
        with pytest.raises(Exception, match="kvq"):
            graph.run(None, feed)
    finally:
        library.load().kvq_set_pass(None)
    assert_still_works(session, forward)


# What the library itself refuses, before it reads anything, has a number there and a name here.


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kernel", 99, "cannot run that instruction set; unset KVQ_NATIVE_ISA"),
        ("kv_heads", 3, "do not fit"),
        ("head_dim", 1025, "do not fit"),
        ("heads", 0, "do not fit"),
    ],
)
def test_a_pass_that_cannot_be_is_refused_before_it_runs(native_pass, field, value, message):
    session, forward = native_pass
    true = getattr(forward._span.given, field)
    setattr(forward._span.given, field, value)
    with pytest.raises(BackendError, match=message) as error:
        forward.forward(np.array(IDS[20:22]), session.store)
    one_line(error)
    setattr(forward._span.given, field, true)
    assert_still_works(session, forward)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("key_precision", 7, "no kernels for; use KVQ_BACKEND=numpy"),
        ("value_precision", 0, "no kernels for"),
        ("capacity", 24, "slots do not fit"),
        ("begin", 1, "slots do not fit"),
        ("count", 1 << 20, "slots do not fit"),
        ("period", 0, "slots do not fit"),
        ("values", 0, "address is missing"),
    ],
)
def test_a_row_of_the_page_table_that_cannot_be_is_refused(native_pass, column, value, message):
    session, forward = native_pass
    forward._span._table.update(session.store)
    rows = forward._span._table.rows
    true = rows[column].copy()
    rows[column][-1] = value
    forward._span.given.page, forward._span.given.pages = forward._span._table.address, len(rows)
    with pytest.raises(BackendError, match=message) as error:
        library.check(library.load().kvq_set_pass(forward._span.given))
    one_line(error)
    # An operator that runs all the same says why there is no pass.
    with pytest.raises(Exception, match=message):
        forward._graph.run()
    library.load().kvq_set_pass(None)
    rows[column] = true
    assert_still_works(session, forward)


def test_what_stops_an_operator_is_told_by_its_own_name(native_pass):
    """Rotary embedding takes the channels of a head in pairs, which a pass alone does not ask for."""
    session, forward = native_pass
    odd = library.Pass(1, 1, 1, 7, 2, 0, -1, 1)
    feed = {"qkv": (2, 21), "cosine": (2, 3), "sine": (2, 3), "mean_key": (1, 7)}
    graph, loaded = foreign_graph(0), library.load()
    assert loaded.kvq_set_pass(ctypes.byref(odd)) == 0
    with pytest.raises(Exception, match="do not fit"):
        graph.run(None, {name: np.ones(size, np.float32) for name, size in feed.items()})
    with pytest.raises(BackendError, match="do not fit"):
        library.check(loaded.kvq_set_pass(None))
    assert loaded.kvq_set_pass(None) == 0  # told once
    assert_still_works(session, forward)


@pytest.mark.parametrize("status", [*range(-8, 0), -99])
def test_every_error_has_a_line_of_its_own(status):
    kinds = {-1: MemoryError, -8: NonFiniteError}
    with pytest.raises(kinds.get(status, BackendError)) as error:
        library.check(status)
    assert len(one_line(error)) > 30
    assert library.check(-status) == -status


def test_limits_and_errors_are_those_of_the_header():
    header = (library.FILE.parent / "kvq.h").read_text()
    for name, value in (("KVQ_ABI", library.ABI), ("CHUNK_SLOTS", library.CHUNK_SLOTS),
                        ("MOST_CHANNELS", library.MOST_CHANNELS)):  # fmt: skip
        assert int(re.search(rf"#define {name} +(\d+)", header)[1]) == value
    errors = {name: int(number) for name, number in re.findall(r"X\((\w+), (-\d+), \"", header)}
    assert errors["NO_MEMORY"] == library.NO_MEMORY
    assert errors["REFUSED_VALUE"] == library.REFUSED_VALUE
    assert sorted(errors.values()) == list(range(-len(errors), 0))


# What a library that is missing, broken or of another version leads to.


@pytest.fixture
def use_library(monkeypatch):
    """Have another file taken for the library."""

    def use(file):
        monkeypatch.setattr(library, "FILE", file)
        library.load.cache_clear()

    monkeypatch.delenv("KVQ_BACKEND", raising=False)
    yield use
    library.load.cache_clear()


def test_a_missing_library_says_what_to_do(tiny_model, use_library, monkeypatch, tmp_path):
    use_library(tmp_path / "libkvq.so")
    monkeypatch.setenv("KVQ_BACKEND", "native")
    with pytest.raises(BackendError, match=r"not built: install .* compiler") as error:
        tiny_model.session()
    one_line(error)


def test_auto_falls_back_to_numpy_and_says_why(tiny_model, use_library, tmp_path):
    use_library(tmp_path / "libkvq.so")
    session = tiny_model.session()
    session.append(IDS[:5])
    stats = session.stats()
    assert stats.backend == "numpy"
    assert "no native: the native library was not built" in stats.backend_detail
    assert "no native" in stats.line()


def test_auto_is_native_where_it_can_be(tiny_model, use_library, monkeypatch):
    monkeypatch.delenv("KVQ_NATIVE_ISA", raising=False)
    stats = tiny_model.session().stats()
    assert (stats.backend, stats.backend_detail) == ("native", KERNELS[-1])


def test_an_instruction_set_that_is_not_there_is_named_with_those_that_are(monkeypatch):
    monkeypatch.setenv("KVQ_NATIVE_ISA", "nonsense")
    with pytest.raises(BackendError, match="KVQ_NATIVE_ISA=nonsense") as error:
        make_backend("native")
    assert all(kernel in one_line(error) for kernel in KERNELS)


def test_a_library_of_another_version_is_refused(use_library, monkeypatch):
    use_library(library.FILE)
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    with pytest.raises(
        BackendError, match=f"version {library.ABI - 1}, this kvq needs {library.ABI}; install"
    ) as error:
        make_backend("native")
    one_line(error)


def test_a_file_that_is_no_library_is_refused(use_library, tmp_path):
    file = tmp_path / "libkvq.so"
    file.write_bytes(b"\x7fELF and nothing more")
    use_library(file)
    with pytest.raises(BackendError, match="cannot be loaded") as error:
        make_backend("native")
    one_line(error)


def test_a_library_of_somebody_else_is_refused(use_library):
    use_library(Path(_ctypes.__file__))
    with pytest.raises(BackendError, match="cannot be loaded") as error:
        make_backend("native")
    one_line(error)
