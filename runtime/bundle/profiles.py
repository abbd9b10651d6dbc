"""Profiles in kvq.json: classes of tokens whose precisions are chosen by layer, see `Geometry.profiles`.

``{"k3v3": [[k, v], ...]}``: by the name of a class a pair of ids of precisions for each layer, of keys and of values.
"""

from __future__ import annotations

from typing import Any

from kvq.runtime.bundle import limits
from kvq.runtime.bundle.fields import integer, mapping, sequence
from kvq.runtime.precision.codecs import CODECS
from kvq.runtime.precision.precision import MOST_ID
from kvq.runtime.precision.table import PROTECTED, Geometry, Pair, pairs

Profiles = tuple[tuple[Pair, tuple[Pair, ...]], ...]


def profiles_of(found: Any) -> Profiles:
    """Of JSON, sorted by class; whether they fit a model is for `check_profiles` to say.

    Raises:
        ValueError: they are none.
    """
    classes = {str(pair): pair for pair in pairs()}
    read = []
    for name, layers in mapping(found, "profiles", limits.CLASSES).items():
        if name not in classes:
            raise ValueError(f"a profile of {name!r:.60}, which is no class")
        by_layer = [_pair(own, name) for own in sequence(layers, f"profile {name}", limits.SHAPE["layers"])]
        read.append((classes[name], tuple(by_layer)))
    return tuple(sorted(read))


def _pair(found: Any, name: str) -> Pair:
    what = f"a layer of profile {name}"
    if len(sequence(found, what, 2)) != 2:
        raise ValueError(f"{what} is {found!r:.60}")
    k, v = (integer(precision, what, 1, MOST_ID) for precision in found)
    if not {k, v} <= CODECS.keys():
        raise ValueError(f"{what} is {found!r:.60}, unknown precisions")
    return Pair(k, v)


def json_of(profiles: Profiles) -> dict[str, list[list[int]]]:
    """As JSON has them; `profiles_of` gives them back."""
    return {str(pair): [list(own) for own in by_layer] for pair, by_layer in profiles}


def check_profiles(geometry: Geometry) -> None:
    """Raise ValueError for profiles that do not fit a model: of another number of layers, of what sinks are kept at, or
    of more bytes than the class has without.
    """
    plain = geometry._replace(profiles=())
    for pair, by_layer in geometry.profiles:
        if len(by_layer) != geometry.layers:
            raise ValueError(f"profile {pair} is of {len(by_layer)} layers, the model has {geometry.layers}")
        if pair in PROTECTED.values():
            raise ValueError(f"profile {pair} is of a class that protects tokens")
        if geometry.token_bytes(pair) > plain.token_bytes(pair):
            raise ValueError(f"profile {pair} takes more bytes than its class")
