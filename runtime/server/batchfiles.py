"""The two files of a batch: requests that are read line by line, and answers that are appended, each once and whole."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvq.runtime.errors import BatchError, RequestError
from kvq.runtime.files import sync_folder, try_lock
from kvq.runtime.server.fields import parse_json

MARK = "batch_req_"
HEAD = b'{"id": "' + MARK.encode()  # what every line of the output begins with
MARK_DIGITS = 24


class Requests:
    """The lines of an input file, known by their `custom_id`; blank lines are none. Close it after use.

    Attributes:
        numbers: line number of each custom_id, from 1, in the order of the file.

    Raises:
        BatchError: a line is no JSON object, has no custom_id, or one that another line has.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.numbers: dict[str, int] = {}
        self._offsets: dict[str, int] = {}
        if not path.is_file():
            raise BatchError(f"{path} is no file; give one of lines as OpenAI's batch API has them")
        self._file = path.open("rb")
        try:
            self._scan()
        except BaseException:
            self.close()
            raise

    def _scan(self) -> None:
        offset = 0
        for number, line in enumerate(self._file, 1):
            if line.strip():
                custom_id = self._parsed(number, line)["custom_id"]
                if custom_id in self.numbers:
                    raise BatchError(
                        f"{self._path} line {number} has the custom_id {custom_id!r:.80} of line"
                        f" {self.numbers[custom_id]}; give every line its own"
                    )
                self.numbers[custom_id], self._offsets[custom_id] = number, offset
            offset += len(line)

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            values = parse_json(line.removeprefix(codecs.BOM_UTF8), echoed=False)
        except RequestError:
            raise BatchError(
                f"{self._path} line {number} is no JSON object; write a request a line, as OpenAI's batch API has them"
            ) from None
        custom_id = values.get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            raise BatchError(f"{self._path} line {number} has no custom_id; give it one, a text of its own")
        return values

    def read(self, custom_id: str) -> tuple[dict[str, Any], bytes]:
        """The object of a line, and the line.

        Raises:
            BatchError: the file is another one by now.
        """
        self._file.seek(self._offsets[custom_id])
        line, number = self._file.readline().strip(), self.numbers[custom_id]
        values = self._parsed(number, line)
        if values["custom_id"] != custom_id:
            raise BatchError(f"{self._path} line {number} has changed meanwhile; start again")
        return values, line

    def same_file(self, path: Path) -> bool:
        """Whether another path is this file."""
        return path.exists() and os.path.samestat(os.fstat(self._file.fileno()), path.stat())

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def mark(line: bytes, settings: Mapping[str, Any]) -> str:
    """The id of an answer: of its line and of all else that it depends on, so that no other is taken for it."""
    told = json.dumps(settings, sort_keys=True).encode()
    return MARK + hashlib.sha256(told + b"\n" + line).hexdigest()[:MARK_DIGITS]


class Answers:
    """The lines of an output file, made if need be, and locked until `close`.

    A last line without its end is what a killed process leaves; it is cut off.

    Args:
        path: the file.
        requests: what it answers.

    Attributes:
        marks: id of the answer to each custom_id that has one.

    Raises:
        BatchError: another process writes it, or it holds something else than answers to these requests.
    """

    def __init__(self, path: Path, requests: Requests) -> None:
        self._path = path
        self.marks: dict[str, str] = {}
        if (path.exists() and not path.is_file()) or requests.same_file(path):
            raise BatchError(f"{path} cannot be the output; choose a file that is not the input")
        file = try_lock(path)
        if file is None:
            raise BatchError(f"{path} is being written by another process; wait for it, or choose another file")
        self._file = file
        try:
            whole = self._read(requests)
            self._file.truncate(whole)
            self._file.seek(whole)
            os.fsync(file.fileno())
            sync_folder(path.absolute().parent)
        except BaseException:
            self.close()
            raise

    def _lines(self) -> Iterator[bytes]:
        with open(self._file.fileno(), "rb", closefd=False) as file:
            yield from file

    def _read(self, requests: Requests) -> int:
        """Take in what is there; bytes of whole lines."""
        whole = 0
        for number, line in enumerate(self._lines(), 1):
            where = f"{self._path} line {number}"
            if not line.endswith(b"\n"):
                if not (line.startswith(HEAD) or HEAD.startswith(line)):
                    raise BatchError(f"{where} was not written by kvq batch; choose another output file")
                break
            custom_id, written = _answered(line)
            if not written:
                raise BatchError(f"{where} was not written by kvq batch; choose another output file")
            if custom_id not in requests.numbers:
                raise BatchError(
                    f"{where} answers {custom_id!r:.80}, which the input does not have; choose another output file"
                )
            if custom_id in self.marks:
                raise BatchError(f"{where} answers {custom_id!r:.80} once more; remove one of the two")
            self.marks[custom_id] = written
            whole += len(line)
        return whole

    def check(self, requests: Requests, settings: Mapping[str, Any]) -> None:
        """Raise BatchError where an answer is to another request than the input's, or was made otherwise."""
        for custom_id, written in self.marks.items():
            if written != mark(requests.read(custom_id)[1], settings):
                raise BatchError(
                    f"{self._path} answers {custom_id!r:.80} as it was asked otherwise: the line, the model or the"
                    " options were others; go back to them, or choose another output file"
                )

    def append(self, values: Mapping[str, Any]) -> None:
        """One more line; it is on disk when this returns.

        values: "id" first, see `mark`.
        """
        # ASCII: U+2028 and its like end a line for some readers.
        line = json.dumps(values, allow_nan=False).encode() + b"\n"
        while line:
            line = line[self._file.write(line) :]
        os.fsync(self._file.fileno())
        self.marks[values["custom_id"]] = values["id"]

    def close(self) -> None:
        """Give the lock back."""
        self._file.close()


def _answered(line: bytes) -> tuple[str, str]:
    """custom_id and id of a line of the output; "" for what is none."""
    try:
        values = parse_json(line, echoed=False)
    except RequestError:
        return "", ""
    custom_id, written = values.get("custom_id"), values.get("id")
    if not (isinstance(custom_id, str) and isinstance(written, str) and line.startswith(HEAD)):
        return "", ""
    return custom_id, written
