"""Rewards with a fault each, for the runs that `record.py` makes."""

import random


def constant(*, completion, **columns):
    """The same for all."""
    return 0.5


def fragile(*, completion, answer, **columns):
    """Right or wrong; no number at all for some answers, about three in a hundred."""
    return float("nan") if completion.strip().endswith(("17", "57", "97")) else float(completion.strip() == answer)


def dice(*, completion, **columns):
    """Knows nothing."""
    return random.random()
