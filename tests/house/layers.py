"""The floor plan: which package may import which; `broken` says where it is not kept."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

# Ground floor first. A package imports from floors below its own, and from itself; packages of one floor do not know
# each other. The longest name that fits a module is its package.
FLOORS = [
    ["kvq.runtime.errors", "kvq.runtime.version", "kvq.runtime.discovery", "kvq.runtime.extras"],
    ["kvq.runtime.keywords", "kvq.runtime.files", "kvq.runtime.machine", "kvq.runtime.text", "kvq.runtime.precision"],
    ["kvq.runtime.kv", "kvq.runtime.bundle"],
    ["kvq.runtime.policy", "kvq.runtime.native", "kvq.runtime.catalog", "kvq.models.shipped"],
    ["kvq.runtime.compute"],
    ["kvq.runtime.session"],
    ["kvq.runtime.chat", "kvq.runtime.inspect", "kvq.controller.policies", "kvq.exporter"],
    ["kvq.controller.training"],
    ["kvq"],  # the composition root: what `import kvq` offers
    ["kvq.controller.evaluation", "kvq.models", "kvq.runtime.server"],
    ["kvq.runtime.cli"],
    ["kvq.controller.cli", "kvq.exporter.cli", "kvq.controller.evaluation.cli"],  # commands of their own packages
    ["kvq.bench", "kvq.__main__"],
]
FLOOR_OF = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
# A package may hold others without importing them or being imported: empty __init__ files.
HOLLOW = {"kvq.runtime", "kvq.controller", "kvq.exporter", "kvq.models", "kvq.bench"}


def package_of(module: str) -> str:
    """The package of the floor plan that a module belongs to."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in FLOOR_OF:
            return name
    raise LookupError(f"{module} stands on no floor")


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and module of every import of ours anywhere in a file, also inside functions and for type checking.

    package: the one that the file lies in, for relative imports.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "kvq")
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module.split(".")[0] == "kvq":
                # `from kvq.runtime import files` names a module, `from kvq import Session` a name.
                yield from ((node.lineno, full if (full := f"{module}.{alias.name}") in FLOOR_OF or module in HOLLOW
                             else module) for alias in node.names)  # fmt: skip


def module_name(file: Path, root: Path) -> str:
    """Dotted name of a file of the checkout: runtime/kv/store.py is kvq.runtime.kv.store."""
    parts = list(file.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts if parts[0] == "kvq" else ["kvq", *parts])


def broken(root: Path) -> list[str]:
    """Every import that goes up or sideways in the tree below `root`, one line each."""
    found = []
    for folder in ("kvq", "runtime", "controller", "exporter", "models", "bench"):
        for file in sorted((root / folder).rglob("*.py")):
            name = module_name(file, root)
            if name in HOLLOW:
                continue
            package = name if file.name == "__init__.py" else name.rpartition(".")[0]
            own = package_of(name)
            for line, module in imports(ast.parse(file.read_text()), package):
                other = package_of(module)
                if other != own and FLOOR_OF[other] >= FLOOR_OF[own]:
                    found.append(f"{file.relative_to(root)}:{line}: {own} imports {module}, which is not below it")
    return found
