"""Rewards with a fault each, for the runs that `record.py` makes."""

import random


def constant(*, completion, **columns):
    """The same for all."""
    return 0.5


def fragile(*, completion, answer, **columns):
    """Right or wrong; no number at all for an answer that ends in 7."""
    return float("nan") if completion.strip().endswith("7") else float(completion.strip() == answer)


def dice(*, completion, **columns):
    """Knows nothing."""
    return random.random()
