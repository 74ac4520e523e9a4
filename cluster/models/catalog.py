"""The models under the operator's folders and those that runs have made, each with what its small files say.

It reads config.json, adapter_config.json, tokenizer files and safetensors headers; never weights, and imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel

from cluster.models.inspect import ModelInfo, count_parameters
from trainers.adapter_folder import read_adapter, tokenizer_source
from trainers.errors import UserError

Kind: TypeAlias = Literal["policy", "reward", "adapter", "other"]

DEPTH = 4  # levels below a root
MOST_MODELS = 2_000
_MOST_FOLDERS = 20_000
_LONGEST_JSON = 16 << 20
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_DEFAULT_LABELS = 2  # of a config.json that does not say


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
        return _whole(model, folder, _json(folder / "config.json"))
    except (OSError, ValueError, UserError) as error:
        return _useless(model, str(error))


def _adapter(model: FoundModel, folder: Path) -> FoundModel:
    config = _json(folder / "adapter_config.json")
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
            "chat_template": _chat_template(Path(tokenizer_source(str(folder)))),
            "usable": problem is None,
            "problem": problem,
        }
    )


def _whole(model: FoundModel, folder: Path, config: dict[str, Any]) -> FoundModel:
    names = config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else None
    text = config.get("text_config")
    info = ModelInfo(name=model.name, config={**config, **text} if isinstance(text, dict) else config, parameters=None)
    dtype = config.get("dtype") or config.get("torch_dtype")
    kind, problem = _kind(architecture, config)
    problem = problem or _missing(folder, config)
    return model.model_copy(
        update={
            "kind": kind,
            "role": None if kind == "other" else kind,
            "architecture": architecture,
            "parameters": count_parameters(folder, where=model.name),
            "dtype": dtype if isinstance(dtype, str) else None,
            "vocabulary": info.vocabulary,
            "context": info.context,
            "chat_template": _chat_template(folder),
            "usable": problem is None,
            "problem": problem,
        }
    )


def _kind(architecture: str | None, config: dict[str, Any]) -> tuple[Kind, str | None]:
    """The kind, and why it is of no use."""
    if architecture is None:
        return "other", "config.json names no architecture"
    if architecture.endswith(_CAUSAL):
        return "policy", None
    if architecture.endswith("ForSequenceClassification"):
        labels = config.get("id2label")
        count = len(labels) if isinstance(labels, dict) else config.get("num_labels", _DEFAULT_LABELS)
        if count == 1:
            return "reward", None
        return "other", f"a classifier with {count} labels; a reward model has one"
    return "other", f"a {architecture}; runs use causal language models and reward models"


def _missing(folder: Path, config: dict[str, Any]) -> str | None:
    if "auto_map" in config:
        return "it needs code of its own to be loaded, which is refused"
    if not _has_weights(folder):
        return "it holds no weights (*.safetensors)"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return "it holds no tokenizer"
    return None


def _useless(model: FoundModel, reason: str) -> FoundModel:
    return model.model_copy(update={"usable": False, "problem": reason.splitlines()[0] if reason else "unreadable"})


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.is_file())


def _chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        return bool(_json(folder / "tokenizer_config.json").get("chat_template"))
    except (OSError, ValueError):
        return False


def _json(file: Path) -> dict[str, Any]:
    if file.stat().st_size > _LONGEST_JSON:
        raise ValueError(f"{file.name} is larger than any model's")
    found = json.loads(file.read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} holds no JSON object")
    return found
