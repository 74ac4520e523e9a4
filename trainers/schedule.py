"""What changes over a run as pure functions of the step: the learning rate, and who writes the completions."""

from __future__ import annotations

import math
from typing import Literal

from trainers.seeds import derive_seed

_SEEDS = 2**62  # how many there are


def learning_rate_factor(
    step: int, *, schedule: Literal["constant", "linear", "cosine"], warmup_steps: int, total_steps: int
) -> float:
    """The factor on the peak learning rate at optimizer step `step` (0-based).

    Rises linearly over `warmup_steps` (step 0 has 1/warmup_steps), then stays, or falls to 0 at `total_steps`.

    >>> [learning_rate_factor(s, schedule="linear", warmup_steps=2, total_steps=4) for s in range(5)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def policy_writes(seed: int, step: int, lmbda: float) -> bool:
    """Whether the policy writes the completions of this step: drawn with probability `lmbda`, once for a step.

    Pure: the same for the same run and step, also after a resume. `lmbda` 1 is always, 0 never; ValueError outside.

    >>> policy_writes(0, 7, lmbda=1.0), policy_writes(0, 7, lmbda=0.0)
    (True, False)
    """
    if not 0 <= lmbda <= 1:
        raise ValueError(f"lmbda is {lmbda}; must be in [0, 1]")
    return derive_seed(seed, "gkd", step) < lmbda * _SEEDS  # "gkd" keeps the draws of runs that began before
