"""The endless order in which a run sees its prompts, with an exact position to save and to restore.

It knows a prompt set and the shuffle. An order depends only on the seed, the data and the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trainers.data.reader import PromptSet
from trainers.data.shuffle import Permutation
from trainers.errors import Problem, UserError
from trainers.types import Prompt

_VERSION = 1


class PromptStream:
    """Prompts without end, epoch after epoch, each epoch in a new seeded order (or in that of the files).

    Without weights all files are one pool. With weights, one for each entry of `data.prompts`, every entry is a pool
    with epochs of its own, and after any number of prompts each pool's share is within one prompt of its weight.
    """

    def __init__(
        self, prompts: PromptSet, *, seed: int, shuffle: bool = True, weights: Sequence[float] | None = None
    ) -> None:
        sizes = prompts.entry_sizes() if weights is not None else [len(prompts)]
        _check(sizes, weights)
        self._prompts = prompts
        self._fingerprint = prompts.fingerprint()
        self._order = f"seed {seed}" if shuffle else "in order"
        self._weights = [float(w) for w in weights] if weights is not None else [1.0]
        self._mixed = weights is not None
        self._sizes = sizes
        self._taken = [0] * len(sizes)  # prompts taken from each pool, over all its epochs
        self._permutations: list[tuple[int, Permutation] | None] = [None] * len(sizes)

    def take(self, n: int) -> list[tuple[str, Prompt]]:
        """The next `n` prompts, each with an id of its own: epoch and position in it (e0-000017; mixed: s1-e0-…)."""
        return [self._next() for _ in range(n)]

    @property
    def epoch(self) -> float:
        """Epochs done, of all pools together."""
        return sum(self._taken) / sum(self._sizes)

    def state(self) -> dict[str, Any]:
        """The position, as JSON can hold it."""
        return {
            "version": _VERSION,
            "fingerprint": self._fingerprint,
            "order": self._order,
            "weights": list(self._weights),
            "taken": list(self._taken),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises UserError if data, seed, shuffling or weights have changed."""
        mine = self.state()
        if state.get("fingerprint") != mine["fingerprint"]:
            message = (
                "the prompts changed since the checkpoint was written (content of a file, or which lines are used); "
                "resume with the same files and data settings, or start a new run (--resume never)"
            )
            raise UserError([Problem("data.prompts", message)])
        for key, where in (("version", "data"), ("order", "seed, data.shuffle"), ("weights", "data.weights")):
            if state.get(key) != mine[key]:
                message = f"{mine[key]} here, {state.get(key)} in the checkpoint; resume with the same settings"
                raise UserError([Problem(where, message)])
        self._taken = [int(n) for n in state["taken"]]

    def _next(self) -> tuple[str, Prompt]:
        pool = self._next_pool()
        epoch, position = divmod(self._taken[pool], self._sizes[pool])
        self._taken[pool] += 1
        place = position if self._order == "in order" else self._permutation(pool, epoch)[position]
        name = f"e{epoch}-{position:06d}"
        return (f"s{pool}-{name}" if self._mixed else name), self._prompts[sum(self._sizes[:pool]) + place]

    def _next_pool(self) -> int:
        """The pool that is furthest behind its share; the first of equals."""
        total, all_weights = sum(self._taken) + 1, math.fsum(self._weights)
        behind = [w / all_weights * total - n for w, n in zip(self._weights, self._taken, strict=True)]
        return behind.index(max(behind))

    def _permutation(self, pool: int, epoch: int) -> Permutation:
        held = self._permutations[pool]
        if held is None or held[0] != epoch:
            held = (epoch, Permutation(self._sizes[pool], key=f"{self._order}, pool {pool}, epoch {epoch}"))
            self._permutations[pool] = held
        return held[1]


def _check(sizes: Sequence[int], weights: Sequence[float] | None) -> None:
    if weights is not None and len(weights) != len(sizes):
        message = f"{len(weights)} weights for {len(sizes)} entries of data.prompts; give one each"
        raise UserError([Problem("data.weights", message)])
    empty = [i for i, n in enumerate(sizes) if n == 0]
    if empty:
        message = f"entry {empty[0]} of data.prompts has no usable prompt; remove it, or fix its lines"
        raise UserError([Problem("data.prompts", message)])
