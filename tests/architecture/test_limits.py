"""The limits that keep the house small: length of files and functions, methods of a class, docstrings, string keys."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in ("trainers", "actors", "cluster", "deploy", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
)
# String keys (`row["step"]`) per 1,000 lines that are not blank: a key that is mistyped is found by a user, an
# attribute by mypy. What remains are JSON schemas, files of other programs, and columns named at run time.
STRING_KEYS: dict[str, float] = {"trainers": 7.0, "actors": 8.0, "cluster": 5.5}
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, METHODS_OF_A_CLASS, PARAMETERS = 400, 60, 15, 6

# "file" or "file:name" → why it may be larger. Every entry must be needed.
ALLOWED: dict[str, str] = {
    "trainers/losses.py:aggregate": "published formulas by name; each keyword is a term of one of them",
    "trainers/losses.py:importance_weights": "published corrections by name; each keyword is a term of one of them",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def offences(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """`(place, what)` for everything over a limit in one source file."""
    tree = ast.parse(text)
    if ast.get_docstring(tree) is None:
        yield f"{path}", "module without docstring"
    if (length := text.count("\n")) > LINES_OF_A_FILE:
        yield f"{path}", f"{length} lines, at most {LINES_OF_A_FILE}"
    for node in ast.walk(tree):
        if isinstance(node, Function):
            if (length := _length(node)) > LINES_OF_A_FUNCTION:
                yield f"{path}:{node.name}", f"{length} lines, at most {LINES_OF_A_FUNCTION}"
            if (count := _parameters(node)) > PARAMETERS and not _is_command(node):
                yield f"{path}:{node.name}", f"{count} parameters, at most {PARAMETERS}"
        if isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, Function)]
            if len(methods) > METHODS_OF_A_CLASS:
                yield f"{path}:{node.name}", f"{len(methods)} methods, at most {METHODS_OF_A_CLASS}"


def _length(function: Function) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def _parameters(function: Function) -> int:
    names = [argument.arg for argument in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]]
    return len([name for name in names if name not in ("self", "cls")])


def _is_command(function: Function) -> bool:
    """A command of the command line: its parameters are its options."""
    return any("command" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_within_limits(path: Path) -> None:
    found = [f"{place}: {what}" for place, what in offences(path, (ROOT / path).read_text()) if place not in ALLOWED]
    assert not found, "\n".join(found)


def string_keys(text: str) -> int:
    """How often a source file looks something up by a literal string in brackets; `Literal["a"]` is a type."""
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Subscript)]
    keys = [node.slice for node in found if ast.unparse(node.value) != "Literal"]
    return sum(isinstance(key, ast.Constant) and isinstance(key.value, str) for key in keys)


def test_string_keys_are_seen() -> None:
    assert string_keys('a["b"]["c"] = d[0] + d[e] + d.get("f")\ng: Literal["h"]') == 2


@pytest.mark.parametrize("layer", STRING_KEYS)
def test_string_keys_stay_few(layer: str) -> None:
    texts = [(ROOT / path).read_text() for path in SOURCES if path.parts[0] == layer]
    lines = sum(bool(line.strip()) for text in texts for line in text.splitlines())
    density = 1000 * sum(map(string_keys, texts)) / lines
    assert density <= STRING_KEYS[layer], f"{density:.1f} string keys per 1,000 lines: use a dataclass or a model"


def test_every_exception_is_needed() -> None:
    places = {place for path in SOURCES for place, _ in offences(path, (ROOT / path).read_text())}
    assert set(ALLOWED) - places == set()


def test_limits_see_offences() -> None:
    long = "def f(a, b, c, d, e, f, g):\n" + "    a = 1\n" * 60
    many = "class C:\n" + "".join(f"    def m{i}(self): ...\n" for i in range(16))
    text = f"{long}{many}" + "\n" * 400  # 61 + 17 + 400 lines
    assert [f"{place}: {what}" for place, what in offences(Path("x.py"), text)] == [
        "x.py: module without docstring",
        "x.py: 478 lines, at most 400",
        "x.py:f: 61 lines, at most 60",
        "x.py:f: 7 parameters, at most 6",
        "x.py:C: 16 methods, at most 15",
    ]
