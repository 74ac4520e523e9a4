"""AdaLoRA's rank allocation (arXiv 2303.10512) under an engine that keeps weights and gradients to itself.

PEFT's own allocator does the work, on whole copies of the adapter's tensors with their gradients (both are small):
once for each optimizer step, after it, on the gradients that it used. It knows PEFT and torch, no engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraModel, RankAllocator
from torch import Tensor, nn

from actors.modeling.peft_adapters import ADAPTER, file_name

_PREFIX = "base_model.model."  # of the module's names; PEFT's allocator sees the model below it
_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class _Tensors:
    """Stands for the model where PEFT's allocator asks for its parameters."""

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self._named = named

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._named.items())


@dataclass
class _Shadow:
    """What `AdaLoraModel.update_and_allocate` reads of the model that it is a method of."""

    model: _Tensors
    peft_config: dict[str, Any]
    rankallocator: RankAllocator
    trainable_adapter_name: str = ADAPTER


class RankAllocation:
    """The ranks of a run's adapter, from full to target. The same numbers on every ZeRO rank."""

    def __init__(self, module: Any, shapes: Mapping[str, torch.Size]) -> None:
        self._config = module.peft_config[ADAPTER]
        self.singular_values = [name for name in shapes if "lora_E" in name]
        self._full_ranks = {_inner(name): shape[0] for name, shape in shapes.items() if "lora_E" in name}
        empty = {_inner(name): nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}
        self._allocator = RankAllocator(_Tensors(empty), self._config, ADAPTER)
        self._step = 0

    def allocate(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """After an optimizer step: the `singular_values` (`lora_E`, by name) as they must be now.

        `weights` are those after the step, `gradients` those that it used, by the module's names, whole; the singular
        values in float32, for what is not cut off comes back as it was given.
        """
        named = {}
        for name, weight in weights.items():
            named[_inner(name)] = nn.Parameter(weight.detach().float().clone())
            named[_inner(name)].grad = gradients[name]
        self._step += 1
        shadow = _Shadow(_Tensors(named), {ADAPTER: self._config}, self._allocator)
        AdaLoraModel.update_and_allocate(shadow, self._step)
        return {_PREFIX + name: value.detach() for name, value in named.items() if name in self._full_ranks}

    def ranks(self) -> dict[str, int]:
        """Rank of each layer now."""
        kept = {file_name(name): sum(mask) for name, mask in (self._config.rank_pattern or {}).items()}
        return {name.split(".lora_E")[0]: kept.get(file_name(name), full) for name, full in self._full_ranks.items()}

    def budget(self) -> int:
        """Ranks of all layers together that the schedule leaves after the last step (arXiv 2303.10512, section 3.3)."""
        budget: int = self._allocator.budget_schedule(self._step)[0]
        return budget

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        averages = {name: dict(getattr(self._allocator, name)) for name in _AVERAGES}
        return {"step": self._step, "rank_pattern": self._config.rank_pattern, **averages}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self._step = int(state["step"])
        self._config.rank_pattern = state["rank_pattern"]
        for name in _AVERAGES:
            setattr(self._allocator, name, dict(state[name]))


def _inner(name: str) -> str:
    return name.removeprefix(_PREFIX)


def orthogonality(named: Mapping[str, Tensor]) -> Tensor:
    """‖P·Pᵀ − I‖ (Frobenius), averaged over every layer's left and right vectors (arXiv 2303.10512, eq. 4).

    As PEFT computes it: lora_A is `[r, in]`, lora_B `[out, r]`.
    """
    norms = []
    for name, tensor in named.items():
        if "lora_A" in name or "lora_B" in name:
            gram = tensor @ tensor.T if "lora_A" in name else tensor.T @ tensor
            norms.append(torch.norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device), p="fro"))
    return torch.stack(norms).mean()
