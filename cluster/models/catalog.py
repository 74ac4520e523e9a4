"""The models under the operator's folders and those that runs have made, each with what its small files say.

It reads config.json, adapter_config.json, tokenizer files and safetensors headers; never weights, and imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import BaseModel

from cluster.models.inspect import ModelInfo, count_parameters
from trainers.adapter_folder import read_adapter, tokenizer_source
from trainers.errors import UserError
from trainers.model_folder import ModelFolder, has_chat_template, has_tokenizer, has_weights, read_json

Kind: TypeAlias = Literal["policy", "reward", "adapter", "other"]

DEPTH = 4  # levels below a root
MOST_MODELS = 2_000
_MOST_FOLDERS = 20_000
_CAUSAL = ("ForCausalLM", "LMHeadModel")


class FoundModel(BaseModel):
    """A model as the page shows it. None: the files do not say."""

    name: str
    path: str
    kind: Kind
    role: Literal["policy", "reward"] | None = None
    """What it can be in a run; an adapter is either, by the task that it was trained for."""
    architecture: str | None = None
    parameters: int | None = None
    bytes: int = 0
    dtype: str | None = None
    vocabulary: int | None = None
    context: int | None = None
    chat_template: bool = False
    base: str | None = None
    run: str | None = None
    usable: bool = True
    problem: str | None = None


class Models:
    """What can be found, remembered by path and time of change."""

    def __init__(self, roots: Sequence[Path], runs: Path) -> None:
        self._roots = tuple(roots)
        self._runs = runs
        self._known: dict[Path, tuple[int, FoundModel]] = {}

    def find(self) -> tuple[list[FoundModel], bool]:
        """Every model, and whether the search ended early."""
        found: list[FoundModel] = []
        for root in self._roots:
            for folder in _model_folders(root):
                found.append(self._described(folder, shown_name(folder.relative_to(root).parts, folder.name), run=None))
                if len(found) >= MOST_MODELS:
                    return found, True
        for folder in sorted(self._runs.glob("*/model"), reverse=True)[: MOST_MODELS - len(found)]:
            if _is_model(folder):
                run = folder.parent.name
                found.append(self._described(folder, f"{run} (trained)", run=run))
        return found, len(found) >= MOST_MODELS

    def _described(self, folder: Path, name: str, *, run: str | None) -> FoundModel:
        files = [entry.stat() for entry in os.scandir(folder) if entry.is_file()]
        changed = hash(tuple(sorted((file.st_ino, file.st_size, file.st_mtime_ns) for file in files)))
        known = self._known.get(folder)
        if known is None or known[0] != changed:
            known = changed, describe(folder, name).model_copy(update={"run": run})
            self._known[folder] = known
        return known[1]


def shown_name(below: Sequence[str], own: str) -> str:
    """`org/model` for a folder of the hub's cache, else the way below the root, or its own name where it is the root.

    >>> shown_name(["models--org--model", "snapshots", "5f0a"], "5f0a"), shown_name(["team", "judge"], "judge")
    ('org/model', 'team/judge')
    """
    parts = below or (own,)
    if parts[0].startswith("models--"):
        return parts[0].removeprefix("models--").replace("--", "/")
    return "/".join(parts)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()


def _model_folders(root: Path) -> Iterator[Path]:
    """Folders that hold a model, in order; links that lead out of the root are not followed."""
    seen: set[Path] = set()
    waiting = [(root, 0)]
    while waiting and len(seen) < _MOST_FOLDERS:
        folder, depth = waiting.pop()
        real = folder.resolve()
        if real in seen or not real.is_relative_to(root):
            continue
        seen.add(real)
        if _is_model(folder):
            yield folder
        elif depth < DEPTH:
            waiting += [(below, depth + 1) for below in reversed(_folders(folder))]


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(Path(e.path) for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    except OSError:
        return []


def describe(folder: Path, name: str) -> FoundModel:
    """What the small files of a folder say; `usable` is False, with the reason, where no run could use it."""
    model = FoundModel(name=name, path=str(folder), kind="other", bytes=_weights_bytes(folder))
    try:
        if not (folder / "config.json").is_file():
            return _adapter(model, folder)
        return _whole(model, ModelFolder.read(folder))
    except (OSError, ValueError, UserError) as error:
        return _useless(model, str(error))


def _adapter(model: FoundModel, folder: Path) -> FoundModel:
    config = read_json(folder / "adapter_config.json")
    base, problem = config.get("base_model_name_or_path"), None
    try:
        base = read_adapter(folder, where=model.name).base
    except UserError as error:
        problem = error.problems[0].message
    return model.model_copy(
        update={
            "kind": "adapter",
            "role": "reward" if config.get("task_type") == "SEQ_CLS" else "policy",
            "architecture": str(config.get("peft_type") or "PEFT"),
            "parameters": count_parameters(folder, where=model.name),
            "base": base if isinstance(base, str) else None,
            "chat_template": has_chat_template(Path(tokenizer_source(str(folder)))),
            "usable": problem is None,
            "problem": problem,
        }
    )


def _whole(model: FoundModel, folder: ModelFolder) -> FoundModel:
    info = ModelInfo(name=model.name, config=folder.sizes, parameters=None)
    dtype = folder.config.get("dtype") or folder.config.get("torch_dtype")
    kind, problem = _kind(folder)
    problem = problem or _missing(folder)
    return model.model_copy(
        update={
            "kind": kind,
            "role": None if kind == "other" else kind,
            "architecture": next(iter(folder.architectures), None),
            "parameters": count_parameters(folder.path, where=model.name),
            "dtype": dtype if isinstance(dtype, str) else None,
            "vocabulary": info.vocabulary,
            "context": info.context,
            "chat_template": has_chat_template(folder.path),
            "usable": problem is None,
            "problem": problem,
        }
    )


def _kind(folder: ModelFolder) -> tuple[Kind, str | None]:
    """The kind, and why a run cannot use it."""
    if not folder.architectures:
        return "other", "config.json names no architecture"
    if folder.architectures[0].endswith(_CAUSAL):
        return "policy", None
    if folder.is_classifier:
        if folder.labels == 1:
            return "reward", None
        return "other", f"a classifier with {folder.labels} labels; a reward model has one"
    return "other", f"a {folder.architectures[0]}; runs use causal language models and reward models"


def _missing(folder: ModelFolder) -> str | None:
    if folder.needs_own_code:
        return "it needs code of its own to be loaded, which is refused"
    if not has_weights(folder.path):
        return "it has no weights (*.safetensors)"
    if not has_tokenizer(folder.path):
        return "it has no tokenizer"
    return None


def _useless(model: FoundModel, reason: str) -> FoundModel:
    return model.model_copy(update={"usable": False, "problem": reason.splitlines()[0] if reason else "unreadable"})


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.is_file())
