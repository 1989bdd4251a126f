"""The package as a whole: imports without circles, plain words, docstrings, and sizes that stay readable.

Every test reads the sources without importing them, and names each place that fails.
"""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "sapo_trl").rglob("*.py"))
MAX_FUNCTION, MAX_FILE = 60, 400  # lines, of a function without its docstring

# Words that only this project would understand -> what to say, and where they stand. Names of metrics, of fields and
# of a library's arguments keep them.
PRIVATE_WORDS = {
    "room (module)": r"\b(the|other) (\w+ )?rooms?\b",
    "dead (zero-advantage row)": r"(?<![a-z])dead(?![a-z])",
    "live rows (active rows)": r"\blive (rows?|groups?|tokens?)\b|\._live\(|def _live\(",
    "deal (rebalance)": r"(?<![a-z])(?<!before_)deal(s|t|ing)?(?![a-z])",
    "lay out (build_inputs)": r"(?<![a-z])(lay|lays|laid|laying)[ _]out(?![a-z])",
    "watched (recorded)": r"(?<![a-z])watched(?![a-z])",
    "pull (effective weight w·r)": r"(?<![\"/])\bpulls?\b(?!\")",
    "stock (built-in)": r"(?<![a-z])stock(?![a-z])",
    "held back (deferred)": r"(?<![a-z])(hold|holds|held|holding)[ _]back(?![a-z])",
    "gold (reference answer)": r"\bgold answers?\b|\b(a|the|our|own) golds?\b(?!_)",
    "nursery (worker server)": r"nursery",
    "mended (corrected)": r"(?<![a-z])mend(s|ed|ing)?(?![a-z])",
    "sampler (rollout engine)": r"trainer-sampler|\bsampler and trainer\b|\bsampler mismatch\b|\bfrom the sampler\b",
}


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def listed(places: list[str]) -> str:
    return "\n  ".join([f"{len(places)} place(s):", *places])


def parsed() -> Iterator[tuple[Path, ast.Module]]:
    for path in SOURCES:
        yield path, ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.Module, known: set[str]) -> set[str]:
    """Modules of the package that a file imports anywhere: at the top, in a function, for type checking only."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known or {str(node.module)}
            if not names <= known:
                found.add(str(node.module))
    return found & known


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, the first repeated at the end; empty without one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_circle_of_imports():
    files = dict(parsed())
    known = {module_name(path) for path in files}
    graph = {module_name(path): imported(tree, known) for path, tree in files.items()}
    circles = []
    while found := circle(graph):
        circles.append(" imports ".join(reversed(found)))
        graph[found[1]] = graph[found[1]] - {found[0]}  # the next circle, if there is one
    assert not circles, listed(circles)


def folder_of(name: str) -> str:
    """The stage of a module: its folder, or the module itself where it is at the root."""
    return ".".join(name.split(".")[:2])


def test_no_circle_between_folders():
    """Stages import each other in one direction only."""
    files = dict(parsed())
    known = {module_name(path) for path in files}
    graph: dict[str, set[str]] = {}
    for path, tree in files.items():
        stage = folder_of(module_name(path))
        graph.setdefault(stage, set()).update({folder_of(name) for name in imported(tree, known)} - {stage})
    found = circle(graph)
    assert not found, " imports ".join(reversed(found))


def test_the_search_for_circles_finds_what_is_imported_for_types_only():
    tree = ast.parse("if TYPE_CHECKING:\n    from p.b import B\ndef f():\n    from p import c, other\n    import os")
    known = {"p", "p.a", "p.b", "p.c"}
    assert imported(tree, known) == {"p", "p.b", "p.c"}
    assert circle({"p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": set()}) == []
    assert set(circle({"p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": {"p.a"}})) == {"p.a", "p.b", "p.c"}


@pytest.mark.parametrize("word", PRIVATE_WORDS)
def test_plain_words(word):
    pattern = re.compile(PRIVATE_WORDS[word], re.IGNORECASE)
    found = [
        f"{place(path, number)}: {line.strip()}"
        for path in (*SOURCES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found, listed(found)


def test_every_module_says_what_it_is_for():
    silent = [place(path, 1) for path, tree in parsed() if not ast.get_docstring(tree)]
    assert not silent, listed(silent)


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, the docstring not counted."""
    first = node.body[0]
    has_docstring = ast.get_docstring(node) is not None
    docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
    return node.end_lineno - node.lineno + 1 - docstring


def test_the_length_of_a_function_is_counted_without_its_docstring():
    (function,) = ast.parse('def f(\n    x,\n):\n    """One.\n\n    Two.\n    """\n    y = x\n    return y\n').body
    assert length(function) == 5


def test_no_function_is_too_long():
    long = [
        f"{place(path, node.lineno)}: {node.name} has {length(node)} lines, at most {MAX_FUNCTION}"
        for path, tree in parsed()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and length(node) > MAX_FUNCTION
    ]
    assert not long, listed(long)


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_is_too_long():
    long = [
        f"{path.relative_to(ROOT)}: {num_lines(path)} lines, at most {MAX_FILE}"
        for path in SOURCES
        if num_lines(path) > MAX_FILE
    ]
    assert not long, listed(long)
