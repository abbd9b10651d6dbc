"""Every public class, function and method of runtime, exporter and controller says what it is for."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator

from tests.tools.tree import named, parsed, sources

FOLDERS = ("runtime", "exporter", "controller")
# Classes from elsewhere that have no methods to override.
BARE = {"ABC", "Enum", "Generic", "IntEnum", "NamedTuple", "Protocol", "StrEnum", "TypedDict"}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def sets(node: Definition) -> bool:
    """Whether this is the setter of a property."""
    return any(ast.unparse(decorator).endswith(".setter") for decorator in node.decorator_list)


def overloads(node: ast.stmt) -> bool:
    """Whether a definition is one of several signatures, of a function whose docstring stands at its body."""
    return any(ast.unparse(each) == "overload" for each in getattr(node, "decorator_list", ()))


def public(body: list[ast.stmt]) -> Iterator[Definition]:
    """Definitions of a module or class, without setters, overloads, and those whose names begin with an underscore."""
    for node in body:
        if isinstance(node, Definition) and not (node.name.startswith("_") or sets(node) or overloads(node)):
            yield node


def bases(node: ast.ClassDef) -> list[str]:
    """What a class derives from, without type arguments."""
    return [ast.unparse(base).partition("[")[0] for base in node.bases]


TREES = {named(path): parsed(path) for path in sources(*FOLDERS)}
CLASSES = {node.name: node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def says(name: str, method: str) -> bool:
    """Whether a class or one above it documents the method; of a class from elsewhere, whether it may."""
    if name not in CLASSES:
        return not hasattr(builtins, name) and name not in BARE
    own = {node.name: node for node in public(CLASSES[name].body)}
    if method in own and ast.get_docstring(own[method]):
        return True
    return any(says(base, method) for base in bases(CLASSES[name]))


def undocumented(name: str, tree: ast.Module) -> Iterator[str]:
    """Public definitions of a file without a docstring, neither their own nor that of what they override."""
    for node in public(tree.body):
        if not ast.get_docstring(node):
            yield f"{name}:{node.lineno} {node.name}"
        if isinstance(node, ast.ClassDef):
            for method in public(node.body):
                if not ast.get_docstring(method) and not any(says(base, method.name) for base in bases(node)):
                    yield f"{name}:{method.lineno} {node.name}.{method.name}"


def test_everything_public_has_a_docstring():
    missing = [line for name, tree in TREES.items() for line in undocumented(name, tree)]
    assert not missing, "\n" + "\n".join(missing)


def test_what_has_none_is_found():
    """A search that sees nothing would find nothing missing."""
    code = (
        "class Plain:\n    def a(self): ...\n    def _b(self): ...\n\nclass Other(Codec):\n    def decode(self): ...\n"
    )
    assert list(undocumented("x", ast.parse(code))) == ["x:1 Plain", "x:2 Plain.a", "x:5 Other"]
