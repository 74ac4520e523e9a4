"""An adapter added to the weights of the model that it stands on, in float32. It knows PEFT, no engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from actors.config import PolicyConfig
from actors.modeling.causal_lm import load_tokenizer
from actors.modeling.peft_adapters import load_weights
from trainers.adapter_folder import AdapterFolder
from trainers.errors import Problem, UserError


def merged(model: nn.Module, adapter: AdapterFolder, *, where: str) -> Any:
    """`model` (float32) with the adapter in its weights. UserError with `where` where the two do not fit."""
    config = peft.PeftConfig.from_pretrained(str(adapter.path))
    config.inference_mode = True
    config.task_type = None  # else PEFT would expect what only models of that task have
    try:
        adapted = peft.PeftModel(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError([Problem(where, f"{adapter.path} does not fit {adapter.base}: {error}")]) from error
    load_weights(adapted, adapter, where=where)
    adapted.eval()
    return adapted.merge_and_unload(safe_merge=True)  # a NaN is an error


def write_merged(policy: PolicyConfig, adapter: AdapterFolder, directory: Path) -> None:
    """The policy, `policy.model` with the adapter merged, in Hugging Face format and in its type. Once: not where
    `directory` is there; whole or not at all."""
    if directory.is_dir():
        return
    base = AutoModelForCausalLM.from_pretrained(
        policy.model, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    _resize(base, adapter)
    tied = untie(base)
    model = merged(base, adapter, where="policy.model").to(getattr(torch, policy.dtype))
    if tied:
        tie_again(model)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    load_tokenizer(policy, adapter).save_pretrained(partial)
    partial.rename(directory)


def _resize(model: Any, adapter: AdapterFolder) -> None:
    """As many rows in the embeddings as the adapter has: tokens were added where it was trained."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    rows = adapter.rows(name)
    if rows is not None and rows != embeddings.num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)  # the adapter has all of the values


def untie(model: Any) -> bool:
    """Two matrices where output head and embeddings were one, since an adapter may be on one of them only; whether
    they were one."""
    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return True


def tie_again(model: Any) -> None:
    """One where they are still the same; else the config says that they are two, or loading would tie them."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    model.config.tie_word_embeddings = torch.equal(head.weight, embeddings.weight)
    if model.config.tie_word_embeddings:
        head.weight = embeddings.weight
