"""What an export writes: every file listed, twice the same bytes, nothing left of one that was interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kvq.composition import open_bundle
from kvq.exporter.export import export
from kvq.runtime.bundle.bundle import Bundle, digest
from kvq.runtime.bundle.manifest import MANIFEST, WEIGHTS
from kvq.runtime.errors import TokenizerError
from tests.tools.checkpoints import TINY, save_checkpoint


def test_the_manifest_lists_every_file_with_size_and_digest(tiny_bundle: Path) -> None:
    files = json.loads((tiny_bundle / MANIFEST).read_text())["files"]
    assert {f.name for f in tiny_bundle.iterdir()} == {*files, MANIFEST}
    assert {WEIGHTS, "tokenizer.json", "head.onnx", "uncertainty.onnx", "segment_003.onnx"} <= files.keys()
    for name, entry in files.items():
        assert entry == {"nbytes": (tiny_bundle / name).stat().st_size, "sha256": digest(tiny_bundle / name)}


def test_the_manifest_describes_the_checkpoint(tiny_bundle: Path) -> None:
    manifest = Bundle(tiny_bundle).manifest
    shape = manifest.architecture
    assert (shape.layers, shape.hidden, shape.ffn, shape.vocab, shape.context) == (3, 64, 172, 512, 256)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (8, 4, 8)
    common = {"layers": "fp32", "head": "fp32", "block": 64, "activations": "int8", "compensated": False, "bits": 32}
    # The rotation of values changes q+k+v and o.
    assert manifest.weights == common | {"exact": 7, "grid": 0, "matrices": 13}
    assert manifest.kv == {"rotation": "hadamard", "centered": True, "values": "folded", "keys": "balanced"}
    assert manifest.eos_token_ids == [0]
    parameters = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 172 * 64) + 512 * 64  # products alone; the head's table once
    assert manifest.decode_weight_nbytes == 4 * parameters


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_exporting_twice_gives_identical_files(weights: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    first, second = (export(str(tiny_checkpoint), tmp_path / name, weights=weights).path for name in "ab")
    names = sorted(f.name for f in first.iterdir())
    assert names == sorted(f.name for f in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert Bundle(first).digest == Bundle(second).digest


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["calibrating keys", "writing segments", "digests", "done"])
def test_interrupted_export_leaves_nothing_behind(
    step: str, error: type[BaseException], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if what == step:
            raise error(step)

    with pytest.raises(error, match=step):
        export(str(tiny_checkpoint), tmp_path / "bundle", weights="fp32", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_progress_counts_up_to_its_total(tiny_checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    export(str(tiny_checkpoint), tmp_path / "bundle", progress=lambda *state: seen.append(state))
    assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen})
    assert {total for _, total, _ in seen} == {seen[-1][0]}


def test_checkpoint_without_tokenizer_runs_on_token_ids_alone(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "checkpoint", TINY | {"num_hidden_layers": 1}, tokenizer=False)
    summary = export(str(path), tmp_path / "bundle", weights="int8")
    assert any("token ids only" in note for note in summary.notes)
    assert not summary.manifest.kv["centered"]
    model = open_bundle(summary.path)
    assert len(list(model.session().generate([1, 2, 3], max_tokens=4, ignore_eos=True))) == 4
    for use in (lambda: model.encode("text"), lambda: list(model.session().generate("text", max_tokens=1))):
        with pytest.raises(TokenizerError, match="no tokenizer; pass token ids") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_chat_template_is_carried_over(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    bundle = export(str(path), tmp_path / "bundle", weights="fp32").path
    assert (bundle / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "chat_template.jinja" in Bundle(bundle).manifest.files
