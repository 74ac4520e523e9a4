"""PEFT adapters on tiny models, with random weights: as if they had been trained before."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


def make_adapter(base: Path, path: Path, *, config: peft.PeftConfig | None = None, seed: int = 1) -> Path:
    """A LoRA adapter of rank 3 (or of `config`) on the model in `base`, every tensor of it random."""
    config = copy.deepcopy(config) or peft.LoraConfig(
        r=3, lora_alpha=5, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    kind = AutoModelForSequenceClassification if config.task_type == "SEQ_CLS" else AutoModelForCausalLM
    options = {"num_labels": 1} if config.task_type == "SEQ_CLS" else {}
    adapted = peft.get_peft_model(kind.from_pretrained(base, dtype=torch.float32, **options), config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(path)
    return path


def change(adapter: Path, **values: Any) -> None:
    """Other values in its `adapter_config.json`."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
