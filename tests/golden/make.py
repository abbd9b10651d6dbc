"""Make the golden session files: ``python -m tests.golden.make``, needed when the embedded model or the format changes.

Each file is written by one backend and has to be read alike by all others. golden.json says what was written and
what the model says next.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import kvq
from tests.tools.session_files import contents, continued

FOLDER = Path(__file__).parent
PROMPT = "The captain looked at the sea, and nobody said a word"


def content_digest(session) -> str:
    """sha256 of all that is stored, whatever the layout of pages."""
    return hashlib.sha256(repr({k: v for k, v in contents(session).items() if k != "settings"}).encode()).hexdigest()


def main() -> None:
    model = kvq.load()
    found = {}
    # A session in the middle of a generation, with every precision; one that has just read its text, with logits.
    for name, policy, backend, generated in (("mixed", "mixed", "native", 9), ("prefilled", "k8v2", "numpy", 0)):
        session = model.session(policy, recent=4, sink=2, backend=backend)
        session.append(model.encode(PROMPT))
        if generated:
            continued(session, generated)
        session.metadata = {"title": "Golden, größer als ASCII", "pages": [1, 2.5, None, True]}
        path = FOLDER / f"{name}.kvq"
        session.save(path)
        stats = session.stats()
        written_by = " ".join(filter(None, (stats.backend, stats.backend_detail)))
        found[name] = {
            "written_by": written_by, "tokens": list(session.tokens), "pending": list(session.pending),
            "content_sha256": content_digest(session), "next": [token for token, _ in continued(session, 12)],
        }  # fmt: skip
    (FOLDER / "golden.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
