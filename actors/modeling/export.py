"""An adapter merged into its base as one whole model, and what that changed. It knows transformers and PEFT, no engine.

Everything is computed in float32, so that the difference that is reported is that of the weights alone: the merged ones
are rounded to the policy's type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.modeling.merge import tie_again, untie
from trainers.logprobs import token_logprobs
from trainers.types import Int32Array


@dataclass(frozen=True, slots=True)
class MergeError:
    """Differences of token log-probabilities (nats): the model as written against base and adapter apart."""

    max: float
    mean: float
    tokens: int  # that were compared


def merge_adapter(
    base: str, adapter: Path, out: Path, *, dtype: str, sequences: Sequence[Int32Array]
) -> MergeError | None:
    """Write `base` (path or hub id) with the LoRA adapter of a folder merged into it, in `dtype`, to `out`.

    `sequences` are token ids `[T]` on which the error is measured; without any it is None. OSError or ValueError where
    base or adapter cannot be loaded.
    """
    model = _load(base, dtype)
    tied = untie(model)
    adapted: Any = peft.PeftModel.from_pretrained(model, adapter).eval()
    before = [_logprobs(adapted, tokens) for tokens in sequences]
    merged: Any = adapted.merge_and_unload(safe_merge=True)
    if tied:
        tie_again(merged)
    merged.to(getattr(torch, dtype)).save_pretrained(out)
    del model, adapted, merged  # one copy in memory is enough
    written = _load(str(out), dtype)
    gaps = [(_logprobs(written, tokens) - then).abs() for tokens, then in zip(sequences, before, strict=True)]
    if not gaps:
        return None
    gap = torch.cat(gaps)
    return MergeError(max=float(gap.max()), mean=float(gap.mean()), tokens=len(gap))


def _load(path: str, dtype: str) -> Any:
    """The weights in `dtype`, as the learners held them, to compute with in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), trust_remote_code=False, use_safetensors=True
    )
    return model.float().eval()


@torch.no_grad()
def _logprobs(model: Any, tokens: Int32Array) -> Tensor:
    """`[T − 1]` log-probabilities of the tokens but the first."""
    ids = torch.tensor(tokens, dtype=torch.long)
    return token_logprobs(model(input_ids=ids[None]).logits[0, :-1], ids[1:])
