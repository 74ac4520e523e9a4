"""DeepSpeed, in this file alone: its configuration, one training engine, its gathered weights and its checkpoints.

The learner's loop decides how many micro-batches an optimizer step has (`managed_gradient_accumulation: false`),
and the loss is already divided by the whole step's totals, so DeepSpeed's averaging over ranks is undone here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from actors.config import LearnerConfig
from actors.learner.host_copies import HostCopies, tensors_of, weights_of
from actors.modeling.checkpoint_names import CheckpointNames
from actors.modeling.peft_adapters import trained_parameters
from actors.weights.transfer import TensorInfo
from trainers.config import TrainConfig
from trainers.errors import Problem, UserError
from trainers.schedule import learning_rate_factor

_GATHER_BYTES = 256 << 20  # ZeRO-3 weights are made whole in groups of about this size
_TAG = "learner"


def engine_config(learner: LearnerConfig, *, dtype: str, max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's configuration for our settings; `UserError` for the one that DeepSpeed gets wrong.

    >>> engine_config(LearnerConfig(zero_stage=1), dtype="float32", max_grad_norm=1.0)["zero_optimization"]["stage"]
    1
    """
    if dtype == "bfloat16" and learner.zero_stage == 0:  # its optimizer takes a step of its own before the first
        message = "0 keeps no float32 master weights for a bfloat16 policy; set 1, or policy.dtype: float32"
        raise UserError([Problem("learners.zero_stage", message)])
    zero: dict[str, Any] = {"stage": learner.zero_stage, "overlap_comm": False, "contiguous_gradients": True}
    if learner.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if learner.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0 if _clips_itself(learner, dtype) else max_grad_norm,
        "steps_per_print": 2**31,
    }
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _clips_itself(learner: LearnerConfig, dtype: str) -> bool:
    """Without ZeRO and in float32 DeepSpeed clips, but does not tell the norm: `_ClippingAdamW` does both."""
    return learner.zero_stage == 0 and dtype == "float32"


class _ClippingAdamW(torch.optim.AdamW):
    """AdamW that clips by the global norm first, and leaves the norm where DeepSpeed looks for it."""

    def __init__(self, parameters: Sequence[nn.Parameter], *, max_grad_norm: float, **options: Any) -> None:
        super().__init__(parameters, **options)
        self._parameters = list(parameters)
        self._max_grad_norm = max_grad_norm
        self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self._global_grad_norm = float(nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm))
        return super().step(closure)


def shard_while_loading(learner: LearnerConfig, *, dtype: str) -> HfDeepSpeedConfig | None:
    """With ZeRO-3: while the returned object lives, `from_pretrained` shards as it loads."""
    if learner.zero_stage < 3:
        return None
    return HfDeepSpeedConfig(engine_config(learner, dtype=dtype, max_grad_norm=1.0))


class TrainingEngine:
    """A model under DeepSpeed: forward, backward over any number of micro-batches, one optimizer step.

    What is trained are the parameters that require a gradient: all of them, or an adapter's.
    """

    def __init__(
        self, model: nn.Module, *, learner: LearnerConfig, train: TrainConfig, dtype: str, total_steps: int
    ) -> None:
        trained = trained_parameters(model)
        self._frozen = len(trained) < sum(1 for _ in model.parameters())
        options: dict[str, Any] = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
        parameters = [parameter for _, parameter in trained]
        optimizer = (
            _ClippingAdamW(parameters, max_grad_norm=train.max_grad_norm, **options)
            if _clips_itself(learner, dtype)
            else torch.optim.AdamW(parameters, **options)
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: learning_rate_factor(
                step, schedule=train.lr_schedule, warmup_steps=train.warmup_steps, total_steps=total_steps
            ),
        )
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=engine_config(learner, dtype=dtype, max_grad_norm=train.max_grad_norm),
        )
        self._world_size: int = torch.distributed.get_world_size()
        self._host = HostCopies()

    def __call__(self, **inputs: Any) -> Any:
        """A forward pass of the policy."""
        return self._engine(**inputs)

    @property
    def device(self) -> torch.device:
        """Where inputs must lie."""
        device: torch.device = self._engine.device
        return device

    @property
    def module(self) -> nn.Module:
        """The model itself; its weights are partitioned under ZeRO-3."""
        module: nn.Module = self._engine.module
        return module

    def weights(self, *, name: Callable[[str], str] = str, form: CheckpointNames | None = None) -> GatheredWeights:
        """The trained weights whole, to send or to export; `name` makes their names of the module's, `form` makes them
        what the model's checkpoint has."""
        return GatheredWeights([(name(own), p) for own, p in trained_parameters(self.module)], form)

    def watch_gradients(self) -> GradientSums:
        """From now on the gradient of every trained weight, whole, whatever ZeRO makes of it."""
        return GradientSums(trained_parameters(self.module), world_size=self._world_size)

    @contextmanager
    def gathered(self) -> Iterator[dict[str, nn.Parameter]]:
        """Within it every trained weight is whole on every rank, and a `backward` may use it."""
        named = dict(trained_parameters(self.module))
        with _whole(list(named.values())):
            yield named

    def masters(self) -> MasterWeights:
        """The optimizer's own copies of the trained weights."""
        return MasterWeights(trained_parameters(self.module))

    @property
    def learning_rate(self) -> float:
        """What the next optimizer step will use."""
        return float(self._engine.get_lr()[0])

    def backward(self, loss: Tensor, *, of_weights: bool = False) -> None:
        """Add a micro-batch's share of the gradient; shares of all ranks and micro-batches add up.

        `of_weights`: the loss is made from the weights, without a forward pass. DeepSpeed counts the backward passes of
        a step in its forward passes; ZeRO-3 would take this for the step's first, which writes over what is there.
        """
        if of_weights and isinstance(self._engine.optimizer, ZeROOptimizer):
            self._engine.optimizer.clear_backward_seen_flag()
        self._engine.backward(loss * self._world_size)

    def step(self) -> float:
        """One optimizer step; the global gradient norm before clipping."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def save(self, directory: Path) -> None:
        """Write this rank's shard of weights and optimizer; every rank calls it."""
        self._engine.save_checkpoint(
            str(directory), tag=_TAG, save_latest=False, exclude_frozen_parameters=self._frozen
        )

    def load(self, directory: Path) -> None:
        """Read what `save` wrote, on the same number of ranks."""
        path, _ = self._engine.load_checkpoint(str(directory), tag=_TAG, load_module_strict=not self._frozen)
        if path is None:
            raise RuntimeError(f"no learner checkpoint in {directory}")

    def offload(self, *, weights: bool = False) -> None:
        """Leave the device to a generator: all but the weights to host memory, so that forward passes still work;
        with `weights` these too, and they do not. What is in host memory already stays there."""
        self._engine.empty_partition_cache()
        states = tensors_of(self._engine.optimizer)
        if weights:
            self._host.take(chain(states, weights_of(self.module)), device=self.device)
        else:
            self._host.take(states, device=self.device, keep=weights_of(self.module))

    def reload(self) -> None:
        """Undo `offload`; nothing to do without one."""
        self._host.restore()


class FrozenEngine:
    """A frozen model for forward passes only: the reference. Sharded over the ranks under ZeRO-3."""

    def __init__(self, model: nn.Module, *, learner: LearnerConfig, dtype: str) -> None:
        model.requires_grad_(False).eval()
        self._model: Any = model
        self._module = model
        self._device = torch.device(deepspeed.get_accelerator().current_device_name())
        self._host = HostCopies()
        if learner.zero_stage == 3:
            config = engine_config(learner, dtype=dtype, max_grad_norm=1.0)
            config["zero_optimization"].pop("offload_optimizer", None)
            self._model, *_ = deepspeed.initialize(model=model, config=config)
        else:
            self._model = model.to(self._device)

    def __call__(self, **inputs: Any) -> Any:
        """A forward pass."""
        return self._model(**inputs)

    def offload(self) -> None:
        """Move the weights to host memory: no forward pass until `reload`."""
        if self._model is not self._module:
            self._model.empty_partition_cache()
        self._host.take(weights_of(self._module), device=self._device)

    def reload(self) -> None:
        """Undo `offload`; nothing to do without one."""
        self._host.restore()


class MasterWeights:
    """The float32 copies of trained weights that the optimizer steps, whole, whatever ZeRO makes of them.

    In float32 without ZeRO they are the weights themselves. Every rank calls the methods.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        self._named = dict(named)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of some."""
        found: dict[str, Tensor] = {}
        for name in names:
            master = safe_get_full_fp32_param(self._named[name])
            found[name] = (self._named[name] if master is None else master).detach().float().clone()
        return found

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Overwrite some, and the weights that they are the masters of."""
        for name, value in values.items():
            parameter = self._named[name]
            with _whole([parameter], modifier_rank=0), torch.no_grad():
                parameter.copy_(value)
            if hasattr(parameter, "ds_id"):
                _set_partition(parameter, value)
            else:
                safe_set_full_fp32_param(parameter, value.float())


class GradientSums:
    """Gradients as they come out of the backward passes, added up beside the engine, which keeps its own to itself."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], *, world_size: int) -> None:
        self._world_size = world_size
        self._parameters = dict(named)
        self._sums: dict[str, Tensor] = {}
        for name, parameter in named:
            parameter.register_hook(partial(self._add, name))

    def take(self) -> dict[str, Tensor]:
        """The sums over all ranks since the last call, float32, by name; 0 where no rank had a gradient.

        Every rank calls it, and all reduce the same names: one may have seen no gradient of a weight (of an expert that
        none of its tokens chose) that others have.
        """
        seen, self._sums = self._sums, {}
        sums = {}
        for name, parameter in self._parameters.items():
            total = seen.get(name)
            if total is None:
                total = torch.zeros(_full_shape(parameter), dtype=torch.float32, device=parameter.device)
            torch.distributed.all_reduce(total)
            sums[name] = total / self._world_size  # `backward` multiplied by it
        return sums

    def _add(self, name: str, gradient: Tensor) -> None:
        grown = gradient.detach().float()
        self._sums[name] = self._sums[name] + grown if name in self._sums else grown.clone()


class GatheredWeights:
    """Parameters whole, group by group; a `WeightSource`. Every rank must iterate it.

    With `form` under the names and in the shapes of the model's checkpoint. What is converted together is gathered
    together.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], form: CheckpointNames | None = None) -> None:
        self._named = dict(named)
        self._form = form
        names = list(self._named)
        self._units = [[name] for name in names] if form is None else form.together(names)

    def infos(self) -> Sequence[TensorInfo]:
        """Names and full shapes, without gathering."""
        found: list[TensorInfo] = []
        for unit in self._units:
            outlines = {}
            for name in unit:
                parameter = self._named[name]
                outlines[name] = torch.empty(_full_shape(parameter), dtype=parameter.dtype, device="meta")
            found += [TensorInfo(name, t.dtype, t.shape) for name, t in self._converted(outlines).items()]
        return found

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """`(name, copy of the full tensor)`; a copy, because the gathered storage is released after the group."""
        for group in self._groups():
            with _whole([self._named[name] for unit in group for name in unit]):
                whole = [{name: self._named[name].detach().clone() for name in unit} for unit in group]
            while whole:
                yield from self._converted(whole.pop(0)).items()

    def _converted(self, unit: dict[str, Tensor]) -> dict[str, Tensor]:
        return unit if self._form is None else self._form.convert(unit)

    def _groups(self) -> Iterator[list[list[str]]]:
        group: list[list[str]] = []
        size = 0
        for unit in self._units:
            parameters = [self._named[name] for name in unit]
            nbytes = sum(_full_shape(p).numel() * p.element_size() for p in parameters)
            if group and size + nbytes > _GATHER_BYTES:
                yield group
                group, size = [], 0
            group.append(unit)
            size += nbytes
        if group:
            yield group


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    """ZeRO-3 leaves a partitioned parameter empty and keeps its shape beside it."""
    shape = getattr(parameter, "ds_shape", None)
    return parameter.shape if shape is None else torch.Size(shape)


def _whole(parameters: Sequence[nn.Parameter], *, modifier_rank: int | None = None) -> AbstractContextManager[Any]:
    """Within it ZeRO-3's partitioned parameters are whole; what `modifier_rank` writes reaches all ranks."""
    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        list(parameters), modifier_rank=modifier_rank
    )
    return gathered


def _set_partition(parameter: Any, value: Tensor) -> None:
    """This rank's part of a ZeRO-3 master weight; parts are padded where the ranks do not divide the whole."""
    size = parameter.ds_tensor.numel()
    start = torch.distributed.get_rank() * size
    part = value.new_zeros(size, dtype=torch.float32)
    own = value.flatten()[start : start + size]
    part[: own.numel()] = own
    safe_set_local_fp32_param(parameter, part)
