"""Random weights in the whole shape of a published model as a GGUF file of type Q8_0, to measure its speed by.

python -m tests.tools.family_files Qwen3-0.6B qwen3.gguf
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.tools.families import DEPTH, REAL, VOCABULARY, save_family
from tests.tools.gguf_files import write_gguf


def write_model(name: str, file: Path) -> Path:
    """Write the file of a model of `REAL`, without a tokenizer; it takes ten bytes a weight for a while."""
    fields = REAL[name] | {"num_hidden_layers": DEPTH[name], "vocab_size": VOCABULARY[name]}
    with tempfile.TemporaryDirectory(dir=file.absolute().parent) as folder:
        save_family(Path(folder), fields, tokenizer=False)
        return write_gguf(file, Path(folder), "Q8_0", general__name=name, tokenizer__ggml__model="no_vocab")


if __name__ == "__main__":
    write_model(sys.argv[1], Path(sys.argv[2]))
