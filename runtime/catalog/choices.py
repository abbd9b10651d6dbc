"""What the user has chosen: the default model, and names for models. One small file in the home."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kvq.runtime.catalog.home import claimed, home, kept
from kvq.runtime.errors import BundleError
from kvq.runtime.files import is_path, read_regular, write_atomically

USER_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
MAX_BYTES = 1 << 24


@dataclass
class Choices:
    """
    Attributes:
        default: reference that stands for no -m; None is the embedded model.
        names: the user's own name -> absolute path of a bundle folder.
        damage: what is wrong with the file, which was left out of account; "" for nothing.
    """

    default: str | None = None
    names: dict[str, str] = field(default_factory=dict)
    damage: str = ""


def path() -> Path:
    """The file."""
    return home() / "choices.json"


def choices() -> Choices:
    """What is chosen now. A damaged file counts as none; see `Choices.damage`."""
    try:
        data = json.loads(read_regular(path(), MAX_BYTES, follow=True).decode())
        default, names = data["default"], data["names"]
        if not (default is None or (isinstance(default, str) and is_path(default))):
            raise ValueError(f"default is {default!r:.60}")
        for name, place in names.items():
            if not USER_NAME.fullmatch(name) or not isinstance(place, str) or not is_path(place):
                raise ValueError(f"name {name!r:.60}")
        return Choices(default, dict(names))
    except (FileNotFoundError, NotADirectoryError):
        return Choices()
    except OSError as error:
        return Choices(damage=f"{path()} cannot be read ({error.strerror})")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Choices(damage=f"{path()} is damaged ({type(error).__name__}: {error!s:.200})")


def chosen_default() -> str | None:
    """The default the user chose, None for none.

    Raises:
        BundleError: the file is damaged, and with it the choice.
    """
    found = choices()
    if found.damage:
        raise BundleError(f"{found.damage}; kvq use NAME writes it anew, -m NAME goes without it")
    return found.default


@contextmanager
def changed(notice: Callable[[str], None] | None = None) -> Iterator[Choices]:
    """The choices to change, written when the block ends well; changes of other processes come before or after."""
    with kept("the choice"), claimed(path()):
        found = choices()
        if found.damage and notice:
            notice(f"{found.damage}; writing it anew")
        yield found
        write_atomically(path(), json.dumps({k: v for k, v in asdict(found).items() if k != "damage"}, indent=1) + "\n")
