"""What is trained, by train type: all weights, an adapter, or an adapter of adaptive rank. Each under one engine.

It names no DeepSpeed; `deepspeed_engine.py` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from actors.learner.adalora import RankAllocation, orthogonality
from actors.learner.deepspeed_engine import TrainingEngine
from actors.messages import LearnerSpec, UpdateReport
from actors.modeling.checkpoint_names import CheckpointNames
from actors.modeling.peft_adapters import ADAPTER, FoldedAdapter, file_name, reference_weights, save_adapter
from actors.weights.transfer import WeightSource
from trainers.algorithms.base import Mean

_RANKS = "adalora.pt"


class TrainedPolicy(Protocol):
    """The policy in training."""

    engine: TrainingEngine

    def exported_weights(self) -> WeightSource:
        """What travels to the generators."""
        ...

    def as_reference(self) -> AbstractContextManager[Any]:
        """Within it the engine computes as the policy did when the run began, where the train type allows it."""
        ...

    def step(self, report: UpdateReport) -> float:
        """One optimizer step, its norm into the report; what this rank added to the loss."""
        ...

    def save(self, directory: Path) -> None:
        """This rank's part of a checkpoint."""
        ...

    def load(self, directory: Path) -> None:
        """Read what `save` wrote."""
        ...

    def write(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        """The result in Hugging Face format; `weights` are the trained ones, whole."""
        ...


def make_trainee(model: nn.Module, spec: LearnerSpec) -> TrainedPolicy:
    """`model` (see `load_policy`) under its engine."""
    engine = TrainingEngine(
        model,
        learner=spec.learners,
        train=spec.train,
        dtype=spec.policy.dtype,
        total_steps=spec.total_optimizer_steps,
    )
    if spec.policy.train_type == "full":
        return WholeModel(engine)
    return AdaptiveAdapter(engine, spec) if spec.policy.train_type == "adalora" else Adapter(engine, spec)


class WholeModel:
    """All weights; the reference is a copy of its own."""

    def __init__(self, engine: TrainingEngine) -> None:
        self.engine = engine

    def exported_weights(self) -> WeightSource:
        """See `TrainedPolicy`."""
        return self.engine.weights(form=CheckpointNames(self.engine.module))

    def as_reference(self) -> AbstractContextManager[Any]:
        """See `TrainedPolicy`."""
        return nullcontext()

    def step(self, report: UpdateReport) -> float:
        """See `TrainedPolicy`."""
        report.grad_norms.append(self.engine.step())
        return 0.0

    def save(self, directory: Path) -> None:
        """See `TrainedPolicy`."""
        self.engine.save(directory)

    def load(self, directory: Path) -> None:
        """See `TrainedPolicy`."""
        self.engine.load(directory)

    def write(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        """See `TrainedPolicy`."""
        model: Any = self.engine.module
        model.config.use_cache = True
        model.save_pretrained(directory, state_dict=dict(weights))
        model.config.use_cache = False


class Adapter(WholeModel):
    """LoRA, on whole or on 4-bit weights: the adapter is trained; without it, or as it began, it is the reference."""

    def __init__(self, engine: TrainingEngine, spec: LearnerSpec) -> None:
        super().__init__(engine)
        self._spec = spec

    def exported_weights(self) -> WeightSource:
        """See `TrainedPolicy`."""
        return self.engine.weights(name=file_name)

    def as_reference(self) -> AbstractContextManager[Any]:
        """See `TrainedPolicy`."""
        return reference_weights(self.engine.module)

    def write(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        """See `TrainedPolicy`."""
        save_adapter(self.engine.module, weights, directory, self._spec.policy)


class AdaptiveAdapter(Adapter):
    """AdaLoRA: the penalty in the loss, and after each optimizer step the ranks."""

    def __init__(self, engine: TrainingEngine, spec: LearnerSpec) -> None:
        super().__init__(engine, spec)
        shapes = {info.name: torch.Size(info.shape) for info in engine.weights().infos()}
        self._ranks = RankAllocation(engine.module, shapes)
        self._gradients, self._masters = engine.watch_gradients(), engine.masters()
        module: Any = engine.module
        self._penalty: float = module.peft_config[ADAPTER].orth_reg_weight

    def exported_weights(self) -> WeightSource:
        """See `TrainedPolicy`."""
        return FoldedAdapter(super().exported_weights())

    def step(self, report: UpdateReport) -> float:
        """See `TrainedPolicy`."""
        added = self._add_penalty(report)
        gradients = self._gradients.take()
        norm = self.engine.step()
        clipped = min(1.0, self._spec.train.max_grad_norm / (norm + 1e-6))  # as the optimizer used them
        weights = dict(self.engine.weights()) | self._masters.read(self._ranks.singular_values)
        used = {name: gradient * clipped for name, gradient in gradients.items()}
        self._masters.write(self._ranks.allocate(weights, used))
        ranks = self._ranks.ranks().values()
        report.grad_norms.append(norm)
        report.metrics["adalora/rank_mean"] = Mean(float(sum(ranks)), float(len(ranks)))
        report.metrics["adalora/budget"] = Mean(float(self._ranks.budget()), 1.0)
        return added

    def _add_penalty(self, report: UpdateReport) -> float:
        """Its gradient, and this rank's equal share of it."""
        with self.engine.gathered() as weights:
            penalty = orthogonality(weights)
            share = self._penalty * penalty / torch.distributed.get_world_size()
            self.engine.backward(share, of_weights=True)
        report.metrics["adalora/orthogonality"] = Mean(float(penalty.detach()), 1.0)
        return float(share.detach())

    def save(self, directory: Path) -> None:
        """See `TrainedPolicy`."""
        super().save(directory)
        if torch.distributed.get_rank() == 0:
            torch.save(self._ranks.state(), directory / _RANKS)

    def load(self, directory: Path) -> None:
        """See `TrainedPolicy`."""
        super().load(directory)
        self._ranks.restore(torch.load(directory / _RANKS, weights_only=True))
