"""The examples in docstrings run: every module that has one, and only those are imported."""

from __future__ import annotations

import doctest
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from _pytest.mark import ParameterSet

ROOT = Path(__file__).resolve().parents[2]
WITH_EXAMPLES = sorted(
    path.relative_to(ROOT)
    for folder in ("trainers", "actors", "cluster", "deploy")
    for path in (ROOT / folder).rglob("*.py")
    if ">>> " in path.read_text()
)


def module_at(path: Path) -> ModuleType:
    """A package's module by its name; a script (deploy/) from its file."""
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    if path.parts[0] != "deploy":
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name.replace(".", "_"), ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def cases() -> list[ParameterSet]:
    """One a module; those of the roles import engines, which takes seconds."""
    slow = {"actors": [pytest.mark.integration]}
    return [pytest.param(path, id=str(path), marks=slow.get(path.parts[0], [])) for path in WITH_EXAMPLES]


@pytest.mark.parametrize("path", cases())
def test_examples(path: Path) -> None:
    result = doctest.testmod(module_at(path), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0
