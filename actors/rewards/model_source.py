"""The reward source `model`: what can be checked of the checkpoint's files, and its replicas on Ray Serve.

It loads the standard library only until `start`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.rewards.config import ModelReward
from actors.rewards.near_names import names_in, nearest
from actors.rewards.source import Pace
from trainers.adapter_folder import is_adapter, read_adapter
from trainers.errors import Problem, UserError

if TYPE_CHECKING:
    from actors.messages import ScoreRequest
    from actors.rewards.ray_serve import Ask, RewardApps
    from actors.rewards.score import Answer

DEFAULT_LABELS = 2  # of a config.json that does not name them


class ModelSource:
    """Implements `RewardSource`."""

    def __init__(self, config: ModelReward, name: str, base_dir: Path) -> None:
        self._config = config
        self._name = name
        self._base_dir = base_dir
        self._ask: Ask

    @property
    def pace(self) -> Pace:
        """See `RewardSource`."""
        return Pace(parallel=self._config.replicas)

    def check(self) -> Problem | None:
        """See `RewardSource`."""
        found = _model_problem(self._config.model, self._base_dir)
        return Problem("model", found) if found else None

    async def start(self, apps: RewardApps) -> str | None:
        """See `RewardSource`: every replica loads the model."""
        from actors.rewards.model_replica import ModelReplica
        from actors.rewards.ray_serve import ServedReward

        config = self._config.model_copy(update={"model": _model_name(self._config.model, self._base_dir)})
        served = ServedReward(self._name, ModelReplica, (config,), replicas=config.replicas, gpus=config.gpus)
        self._ask, wrong = await apps.deploy(served)
        return wrong

    async def score(self, request: ScoreRequest) -> list[Answer]:
        """See `RewardSource`."""
        return await self._ask(request.prompt, request.texts)

    async def close(self) -> None:
        """See `RewardSource`."""


def _model_name(name: str, base_dir: Path) -> str:
    """The folder of a model, or, if there is none, the hub id that it then must be."""
    folder = base_dir / Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


def _model_problem(name: str, base_dir: Path) -> str | None:
    folder = Path(_model_name(name, base_dir))
    if not folder.is_dir():
        return _missing_model(name, base_dir)
    if is_adapter(folder):
        return _adapter_problem(folder)
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        return f"{folder} has no config.json; expected a model in Hugging Face format"
    except (OSError, ValueError) as error:
        return f"{folder / 'config.json'} cannot be read: {error}"
    if not isinstance(config, dict):
        return f"{folder / 'config.json'} is not a JSON object"
    return _checkpoint_problem(folder, config)


def _adapter_problem(folder: Path) -> str | None:
    try:
        adapter = read_adapter(folder, where="rewards")
    except UserError as error:
        return error.problems[0].message
    task = adapter.config.task_type
    if task != "SEQ_CLS" or not adapter.labels:
        return f"{folder} is an adapter for {task}; a reward model's is for SEQ_CLS and holds its head's weights"
    if adapter.labels != 1:
        return f"{folder} is an adapter of a classifier with {adapter.labels} labels; a reward model has exactly one"
    base = Path(adapter.base)
    if base.is_dir() and not (base / "config.json").is_file():
        return f"the base of {folder} is not a model: {base} has no config.json"
    if base.is_dir() and not any(base.glob("*.safetensors")):
        return f"{base}, the base of {folder}, has no *.safetensors; other formats can run code and are refused"
    return None


def _missing_model(name: str, base_dir: Path) -> str | None:
    """A hub id has one slash at most; where its first part is a folder here, a path was meant."""
    path = Path(name).expanduser()
    parent = (base_dir / path).parent
    is_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if is_path or ("/" in name and parent.is_dir()):
        return f"no such folder: {base_dir / path}{nearest(path.name, names_in(parent))}"
    return None


def _checkpoint_problem(folder: Path, config: dict[str, Any]) -> str | None:
    architectures = config.get("architectures") or []
    if "auto_map" in config:
        return f"{folder} needs code of its own to be loaded, which is refused; use a model that transformers knows"
    if not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        found = ", ".join(map(str, architectures)) or "nothing"
        return (
            f"{folder} is not a sequence-classification checkpoint (its architectures: {found}); "
            "a reward model is one with a single label"
        )
    id2label = config.get("id2label")
    labels = len(id2label) if isinstance(id2label, dict) else config.get("num_labels", DEFAULT_LABELS)
    if labels != 1:
        return f"{folder} is a classifier with {labels} labels; a reward model has exactly one"
    if not any(folder.glob("*.safetensors")):
        return f"{folder} has no *.safetensors; other formats can run code and are refused"
    return None
