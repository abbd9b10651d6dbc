"""What the documents name exists: links, files and what they define (`FOLDER/FILE.py:NAME`), modules."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "models").glob("*.md")]
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
FENCE = re.compile(r"^(```|~~~).*?^\1$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
TICKS = re.compile(r"`([^`\n]+)`")
# A file with its folder, and perhaps what is defined in it; a file alone counts where its kind is one of our sources.
FILE = re.compile(
    r"(\.?[\w*{},-]+(?:/\.?[\w.*{},-]+)*\.(?:py|c|h|md|toml|json|txt|jinja|sh|png|kvq|bin|onnx))(?::([\w.]+))?"
)
FOLDER = re.compile(r"((?:bench|controller|docs|exporter|kvq|models|runtime|tests)(?:/[\w*-]+)+)/?")
SOURCES = {".py", ".c", ".h", ".md"}
MODULE = re.compile(r"(?<![\w/])kvq(?:\.[A-Za-z_]\w*)+")
MADE_UP = re.compile(r"\b(?:NAME|FILE|FOLDER)\b|[<{]")  # `runtime/precision/codecs/NAME.py`: a reader's own
HISTORY = ROOT / "CHANGELOG.md"  # names what is no more


def prose(page: Path) -> str:
    """A page without its blocks of code: these are run, or made up."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What may stand behind # in a link to a page, as GitHub makes it of headings."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")
        names.add(f"{name}-{found[name]}" if name in found else name)
        found[name] = found.get(name, 0) + 1
    return names


def broken_link(page: Path, target: str) -> str:
    """What is wrong with a link; empty if nothing, or if it leaves the repository."""
    if re.match(r"[a-z]+:", target):
        return ""
    name, _, anchor = target.partition("#")
    file = (page.parent / name).resolve() if name else page
    if not file.exists():
        return "there is no such file"
    if ROOT not in (file, *file.parents):
        return "it leaves the repository"
    return "" if not anchor or file.suffix != ".md" or anchor in anchors(file) else "there is no such heading"


def files_of(page: Path, name: str) -> list[Path]:
    """The files that a name in a page may stand for."""
    if "/" not in name:
        return [path for path in ROOT.rglob(name) if not any(p.startswith(".") for p in path.relative_to(ROOT).parts)]
    return [path for base in (ROOT, page.parent) for path in base.glob(name.rstrip("/"))]


def defines(file: Path, name: str) -> bool:
    """Whether a source defines `name` or `Class.name`; in C, whether it says the word."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return re.search(rf"\b{re.escape(name)}\b", text) is not None
    scope: ast.AST | None = ast.parse(text)
    for part in name.split("."):
        scope = next((node for node in ast.walk(scope) if part in _names(node)), None)
        if scope is None:
            return False
    return True


def _names(node: ast.AST) -> set[str]:
    """Names that a statement gives: of a class, a function, variables, attributes of self."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    parts = [part for target in targets for part in ast.walk(target)]
    return {part.id for part in parts if isinstance(part, ast.Name)} | {
        part.attr for part in parts if isinstance(part, ast.Attribute)
    }


def missing_module(dotted: str) -> bool:
    """Whether neither a module nor what it offers has this name; one that lacks a foreign package is there."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.util.find_spec(".".join(parts[:length]))
        except ModuleNotFoundError:
            found = None
        if found is None:
            continue
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ImportError as error:
            return (error.name or "").startswith("kvq")
        for part in parts[length:]:
            if not hasattr(value, part):
                return part not in getattr(value, "__annotations__", {})
            value = getattr(value, part)
        return False
    return True


every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
every_page_of_today = pytest.mark.parametrize(
    "page", [page for page in PAGES if page != HISTORY], ids=lambda page: str(page.relative_to(ROOT))
)


@every_page
def test_links_lead_somewhere(page):
    wrong = {target: why for target in LINK.findall(prose(page)) if (why := broken_link(page, target))}
    assert not wrong


@every_page_of_today
def test_files_and_what_they_define_exist(page):
    wrong = []
    for text in TICKS.findall(prose(page)):
        match = FILE.fullmatch(text) or FOLDER.fullmatch(text)
        if match is None or MADE_UP.search(text) or ("/" not in text and Path(match[1]).suffix not in SOURCES):
            continue
        name = match.group(2) if match.re is FILE else None
        if not any(name is None or defines(file, name) for file in files_of(page, match[1])):
            wrong.append(text)
    assert not wrong


@every_page_of_today
def test_modules_and_what_they_offer_exist(page):
    ticked = [text for text in TICKS.findall(prose(page)) if not FILE.fullmatch(text)]
    named = {match for text in ticked for match in MODULE.findall(text)}
    named |= set(re.findall(r"python -m (kvq(?:\.\w+)+)", page.read_text(encoding="utf-8")))
    wrong = [name for name in sorted(named) if not MADE_UP.search(name) and missing_module(name)]
    assert not wrong


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ("runtime/files.py:atomic_file", True),
        ("runtime/kv/store.py:KVStore.append", True),
        ("runtime/kv/store.py:KVStore.shrink", False),
        ("runtime/native/kvq.h:kvq_attend", True),
        ("runtime/native/kvq.h:kvq_attend_all", False),
        ("runtime/nowhere.py", False),
    ],
)
def test_what_counts_as_there(text, there):
    match = FILE.fullmatch(text)
    found = files_of(ROOT / "README.md", match[1])
    assert any(match[2] is None or defines(file, match[2]) for file in found) == there
