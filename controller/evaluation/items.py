"""Items of multiple-choice tasks, from files of JSON lines that come from anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvq.controller.training.texts import read_text
from kvq.runtime.errors import CalibrationError


def items_of(name: str, file: Path) -> list[dict[str, Any]]:
    """Query, choices and gold of the objects of a file of JSON lines.

    Args:
        name: of the task.
        file: its items.

    Raises:
        CalibrationError: no such file, or a line that is no item.
    """
    if not file.is_file():
        raise CalibrationError(f"no task file {file}; give the folder that holds {name}.jsonl with --data")
    items = []
    for number, line in enumerate(read_text(file, "--data").split("\n"), 1):
        if not line.strip():
            continue
        try:
            items.append(_item(json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CalibrationError(
                f"{file}:{number} is no item: it needs a query, a list of choices, which are texts, and gold, the"
                " number of the right choice from 0"
            ) from None
    return items


def _item(found: dict[str, Any]) -> dict[str, Any]:
    """What a line says of an item, and nothing else that it says: columns of any types have no place in a data set.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    query, choices, gold = found["query"], found["choices"], found["gold"]
    if not isinstance(choices, list) or type(gold) is not int or not 0 <= gold < len(choices):
        raise ValueError
    texts = [query, *choices]
    if not all(isinstance(text, str) for text in texts) or not all(choices):  # of an empty one is nothing to score
        raise ValueError
    "".join(texts).encode()  # half a surrogate pair, which JSON can name, is no text
    return {"query": query, "choices": choices, "gold": gold}
