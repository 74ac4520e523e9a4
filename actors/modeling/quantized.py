"""QLoRA's base: 4-bit weights (NF4, doubly quantized, arXiv 2305.14314) through bitsandbytes. It knows no engine.

The generators hold the same numbers de-quantized, so that what writes and what trains compute the same function.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes import nn as bnb
from torch import Tensor, nn
from transformers import BitsAndBytesConfig


def quantization(dtype: torch.dtype, *, whole: Sequence[str] = ()) -> BitsAndBytesConfig:
    """How the linear layers are held: four bits each, computed with in `dtype`; those called `whole` as they are.

    Without names transformers spares the output head alone.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=list(whole) or None,
    )


def quantized_layers(model: nn.Module) -> dict[str, bnb.Linear4bit]:
    """The 4-bit layers by the names that they have in the model without an adapter."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, bnb.Linear4bit)
    }


def hide_quantized(model: nn.Module) -> None:
    """Take the 4-bit weights off the list of parameters.

    ZeRO-3 would cut them like any other and compute with what it puts together again (silently wrong: the loss after
    12 steps is 5.00 instead of 4.70); hidden, every rank keeps them whole, half a byte a weight.
    """
    for layer in quantized_layers(model).values():
        weight = layer._parameters.pop("weight")
        object.__setattr__(layer, "weight", weight)


def dequantized(layer: Any) -> Tensor:
    """A layer's weights as it computes with them, `[out, in]`."""
    weight = layer.weight
    whole: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
    return whole


def write_dequantized(quantized: nn.Module, plain: Any, directory: Path) -> None:
    """Save `plain`, its weights replaced by those of the 4-bit layers of `quantized`, in Hugging Face format."""
    with torch.no_grad():
        for name, layer in quantized_layers(quantized).items():
            target = plain.get_submodule(name).weight
            target.copy_(dequantized(layer).to(target.dtype))
    plain.save_pretrained(directory)
