"""The reward source `model`: what can be checked of the checkpoint's files, and its replicas on Ray Serve.

It loads the standard library only until `start`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from actors.rewards.config import ModelReward
from actors.rewards.near_names import names_in, nearest
from actors.rewards.source import Pace
from trainers.adapter_folder import is_adapter, read_adapter
from trainers.errors import Problem, UserError
from trainers.model_folder import ModelFolder, has_weights, is_path

if TYPE_CHECKING:
    from actors.messages import ScoreRequest
    from actors.rewards.ray_serve import Ask, RewardApps
    from actors.rewards.score import Answer


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
        return _checkpoint_problem(ModelFolder.read(folder))
    except ValueError as error:
        return str(error)


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
    if not base.is_dir():
        return None
    try:
        ModelFolder.read(base)
    except ValueError as error:
        return f"the base of {folder} is not a model: {error}"
    if not has_weights(base):
        return f"{base}, the base of {folder}, has no *.safetensors; other formats can run code and are refused"
    return None


def _missing_model(name: str, base_dir: Path) -> str | None:
    if not is_path(name, base_dir):
        return None
    path = base_dir / Path(name).expanduser()
    if path.is_file():
        return f"{path} is a file; give the folder of a model"
    return f"no such folder: {path}{nearest(path.name, names_in(path.parent))}"


def _checkpoint_problem(model: ModelFolder) -> str | None:
    folder = model.path
    if model.needs_own_code:
        return f"{folder} needs code of its own to be loaded, which is refused; use a model that transformers knows"
    if not model.is_classifier:
        found = ", ".join(model.architectures) or "nothing"
        return (
            f"{folder} is not a sequence-classification checkpoint (its architectures: {found}); "
            "a reward model is one with a single label"
        )
    if model.labels != 1:
        return f"{folder} is a classifier with {model.labels} labels; a reward model has exactly one"
    if not has_weights(folder):
        return f"{folder} has no *.safetensors; other formats can run code and are refused"
    return None
