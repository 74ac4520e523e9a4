"""Learning-rate schedules as pure functions of the optimizer step."""

from __future__ import annotations

import math
from typing import Literal


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
