"""transformers without torch, for processes that tokenize and never load a model: 2 seconds to import in place of 10.

Without torch transformers offers its tokenizers and configs only, which it supports and announces. Whether torch is
there is decided once in a process, when transformers is first imported; so a command calls this before anything else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Final

_QUIET: Final = "TRANSFORMERS_NO_ADVISORY_WARNINGS"  # it would advise to install torch


def import_tokenizers() -> None:
    """Import transformers as if torch were not installed; torch itself can be imported afterwards.

    Does nothing if transformers has been imported already.
    """
    if "transformers" in sys.modules:
        return
    with _hidden("torch"), _set(_QUIET, "1"):
        from transformers.utils import is_torch_available

        assert not is_torch_available()  # and remembered


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """A module that cannot be imported as long as the block lasts."""
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]  # None: "not found"
    before = modules.get(name)
    modules[name] = None
    try:
        yield
    finally:
        del modules[name]
        if before is not None:
            modules[name] = before


@contextmanager
def _set(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
