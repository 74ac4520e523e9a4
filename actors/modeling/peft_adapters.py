"""Adapters of the policy (PEFT): put on, switched off, read out for the generators, saved. It knows no engine.

Three names of one tensor: the module's (`….lora_A.default.weight`), PEFT's in a file (`….lora_A.weight`), and for
AdaLoRA what the generators get, a plain LoRA pair that computes the same function.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from actors.config import LoraConfig, PolicyConfig
from actors.weights.transfer import TensorInfo, WeightSource
from trainers.adapter_folder import WEIGHTS, AdapterFolder
from trainers.errors import Problem, UserError

ADAPTER = "default"  # the name that PEFT gives to the only adapter
REFERENCE = "reference"  # beside an adapter that is continued: the same as it was when the run began, frozen
_TWICE = re.compile(r"\.(modules_to_save|original_module)(?=\.)")  # PEFT saves resized embeddings under these names too
PLAIN_FOLDER = "lora"  # beside an AdaLoRA adapter: the plain one that vLLM serves


def attach_adapter(model: nn.Module, policy: PolicyConfig, *, total_steps: int) -> nn.Module:
    """The model with a fresh adapter, everything else frozen; `UserError` where no layer has a wanted name."""
    lora = policy.lora
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "lora_alpha": lora.alpha,
        "target_modules": _targets(lora),
    }
    config: peft.PeftConfig
    if policy.train_type == "adalora":
        tinit, tfinal = lora.schedule(total_steps)
        config = peft.AdaLoraConfig(
            init_r=lora.init_r,
            target_r=lora.target_r,
            tinit=tinit,
            tfinal=tfinal,
            deltaT=lora.delta_t,
            total_step=total_steps,
            orth_reg_weight=lora.orth_reg_weight,
            **common,
        )
    else:
        config = peft.LoraConfig(r=lora.r, **common)
    with _targets_exist(model, lora):
        adapted = peft.get_peft_model(model, config, adapter_name=ADAPTER, autocast_adapter_dtype=False)
    _adapters_in(adapted, policy.dtype)
    for name, parameter in adapted.named_parameters():
        if "ranknum" in name:  # a constant, that PEFT makes trainable where it casts it
            parameter.requires_grad_(False)
    trained: nn.Module = adapted
    return trained


def attach_beside(model: nn.Module, head: nn.Linear, lora: LoraConfig, *, dtype: str) -> None:
    """Put a fresh LoRA adapter on the layers of `model` but its `head`, in place; these two are trained, the rest is
    frozen. `UserError` where no layer has a wanted name."""
    (name,) = (name for name, module in model.named_modules() if module is head)
    config = peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=_targets(lora), exclude_modules=[name])
    with _targets_exist(model, lora):
        peft.inject_adapter_in_model(config, model, ADAPTER)
    head.requires_grad_(True)
    _adapters_in(model, dtype)


def _targets(lora: LoraConfig) -> str | list[str]:
    return lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)


@contextmanager
def _targets_exist(model: nn.Module, lora: LoraConfig) -> Iterator[None]:
    """Says what PEFT says of layers that are not there, or are not linear, as the user should read it."""
    try:
        yield
    except ValueError as error:
        if "arget module" not in str(error):
            raise
        raise UserError([Problem("policy.lora.target_modules", missing_targets(model, lora.target_modules))]) from None


def continue_adapter(model: nn.Module, policy: PolicyConfig, adapter: AdapterFolder) -> nn.Module:
    """The model with an adapter that was trained before, to train on, and a frozen copy of it as the reference."""
    where = "policy.model"
    try:
        adapted: Any = None
        for name in (ADAPTER, REFERENCE):
            config = peft.LoraConfig.from_pretrained(str(adapter.path))
            config.task_type, config.base_model_name_or_path = "CAUSAL_LM", adapter.base
            config.lora_dropout, config.inference_mode = 0.0, name == REFERENCE  # see `LoraConfig.dropout`
            if adapted is None:
                adapted = peft.get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=False)
            else:
                adapted.add_adapter(name, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError([Problem(where, f"{adapter.path} does not fit {adapter.base}: {error}")]) from error
    for name in (ADAPTER, REFERENCE):
        load_weights(adapted, adapter, name, where=where)
    _adapters_in(adapted, policy.dtype)
    trained: nn.Module = adapted
    return trained


def load_weights(adapted: Any, adapter: AdapterFolder, name: str = ADAPTER, *, where: str) -> None:
    """An adapter's weights from its file, all of them; UserError with `where` where it has others than the model."""
    tensors = load_file(adapter.path / WEIGHTS)
    try:
        found = peft.set_peft_model_state_dict(adapted, dict(tensors), adapter_name=name)
    except RuntimeError as error:  # other shapes
        raise UserError([Problem(where, f"{adapter.path} does not fit {adapter.base}: {error}")]) from error
    wrong = [key for key in found.missing_keys if f".{name}." in f"{key}." and ".ranknum." not in key]  # a constant
    wrong += [key for key in found.unexpected_keys if not (_TWICE.search(key) and _TWICE.sub("", key) in tensors)]
    if wrong:
        message = (
            f"{adapter.path} does not fit {adapter.base}: {len(wrong)} names of tensors differ, such as {wrong[0]}"
        )
        raise UserError([Problem(where, message)])


def _adapters_in(model: nn.Module, dtype: str) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))


@contextmanager
def reference_weights(module: Any) -> Iterator[None]:
    """Within it the model computes as it did when the run began: with the reference, or with no adapter."""
    if REFERENCE not in module.peft_config:
        with module.disable_adapter():
            yield
        return
    module.set_adapter(REFERENCE, inference_mode=True)
    try:
        yield
    finally:
        module.set_adapter(ADAPTER)


def missing_targets(model: nn.Module, wanted: Sequence[str]) -> str:
    """What to say where no layer has one of the wanted names."""
    linear = sorted(
        {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    )
    return f"no linear layer of the model is called {' or '.join(wanted)}; its linear layers are {', '.join(linear)}"


def trained_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What the optimizer changes, under the module's own names."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def file_name(name: str) -> str:
    """A tensor's name in an adapter's file.

    >>> file_name("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight")
    'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
    """
    return name.replace(f".{ADAPTER}", "")


class FoldedAdapter:
    """AdaLoRA's P·Λ·Q of each layer as a plain LoRA pair, A' = Λ·Q and B' = P; a `WeightSource` over another one.

    The generators scale by `PolicyConfig.served_alpha` / rank, as PEFT's layer does (arXiv 2303.10512, eq. 3).
    """

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def infos(self) -> Sequence[TensorInfo]:
        """Names, types and shapes of the pairs."""
        return [
            TensorInfo(f"{info.name}.weight", info.dtype, info.shape)
            for info in self._source.infos()
            if not info.name.endswith("lora_E")
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """A fresh pass over `(name, tensor)`."""
        return fold_adalora(self._source)


def fold_adalora(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """`(….lora_A.weight, [r, in])` and `(….lora_B.weight, [out, r])` of each layer's lora_A, lora_B and lora_E."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in named:
        layer, _, kind = name.rpartition(".")
        parts = layers.setdefault(layer, {})
        parts[kind] = tensor
        if len(parts) == 3:
            yield f"{layer}.lora_A.weight", parts["lora_A"] * parts["lora_E"]
            yield f"{layer}.lora_B.weight", parts["lora_B"]
            del layers[layer]
    assert not layers, f"adapter layers without all three parts: {sorted(layers)}"


def adapter_config(policy: PolicyConfig, names: Iterable[str], *, base: str | None = None) -> dict[str, Any]:
    """PEFT's `adapter_config.json` of the plain adapter with these tensors."""
    rank = policy.adapter_rank
    assert rank is not None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": policy.served_alpha,
        "target_modules": sorted({name.split(".lora_")[0].rpartition(".")[2] for name in names}),
        "bias": "none",
        "inference_mode": True,
    }


def write_plain_adapter(
    directory: Path, tensors: Mapping[str, Tensor], policy: PolicyConfig, *, base: str | None = None
) -> None:
    """A plain LoRA adapter as PEFT and vLLM read it."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "adapter_model.safetensors")
    config = adapter_config(policy, tensors, base=base)
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def save_adapter(module: Any, tensors: Mapping[str, Tensor], directory: Path, policy: PolicyConfig) -> None:
    """The trained adapter in PEFT's format; for AdaLoRA also the plain one, in the folder `lora`.

    `tensors` are the trained ones, whole, under the module's own names.
    """
    module.save_pretrained(
        directory,
        state_dict=dict(tensors),
        selected_adapters=[ADAPTER],
        save_embedding_layers=False,
        safe_serialization=True,
    )
    if policy.train_type == "adalora":
        plain = dict(fold_adalora((file_name(name), tensor) for name, tensor in tensors.items()))
        write_plain_adapter(directory / PLAIN_FOLDER, plain, policy, base=policy.model)
