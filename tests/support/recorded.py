"""What a run's files record, compared with what transformers and PEFT compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors import safe_open

SAMPLES = 8


def recorded_gap(model: Any, rollouts: Path) -> float:
    """Largest difference of a model's log-probabilities from those that the generator wrote in a rollouts' file."""
    worst = 0.0
    for row in pq.read_table(rollouts).to_pylist()[:SAMPLES]:
        ids = torch.tensor([row["prompt_tokens"] + row["tokens"]])
        with torch.no_grad():
            logprobs = model(ids).logits.double().log_softmax(-1)[0, len(row["prompt_tokens"]) - 1 : -1]
        chosen = logprobs.gather(1, ids[0, len(row["prompt_tokens"]) :, None])[:, 0]
        worst = max(worst, float((chosen - torch.tensor(row["logprobs"])).abs().max()))
    return worst


def adapter_bytes(folder: Path) -> int:
    """Of all tensors of the adapter in a folder."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        return sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
