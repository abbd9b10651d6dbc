"""A process that is measured: it reads requests, one JSON object a line, and answers each with one.

    python -P child.py TARGET JOB

TARGET makes an object, as module:name, or as file.py:name where kvq is another checkout's, of which this file must not
import anything. JOB is a JSON object of its keyword arguments. {"do": "name", ...} calls the object's method of that
name; an error is answered with {"error": "..."} and ends the process. Standard output belongs to the protocol alone:
what libraries print goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    place, name = sys.argv[1].rsplit(":", 1)
    server = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if server is None:
                found = runpy.run_path(place) if place.endswith(".py") else vars(importlib.import_module(place))
                server = found[name](**json.loads(sys.argv[2]))
            answer = getattr(server, request.pop("do"))(**request) or {}
        except Exception as error:  # a library may fail in any way
            text = " ".join(str(error).split())[:400]
            answers.write(json.dumps({"error": f"{type(error).__name__}: {text}"}) + "\n")
            raise
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
