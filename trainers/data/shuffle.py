"""A seeded order of n things without a table of n numbers: a small Feistel network with cycle walking.

Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), method 2. It knows integers only, so the
order stays the same on every machine and library version.
"""

from __future__ import annotations

import hashlib

_ROUNDS = 6
_MIN_HALF_BITS = 3  # a domain below 64 leaves a network too few bits to be near uniform
_MASK = 2**64 - 1


class Permutation:
    """A bijection of 0 … n-1 drawn by its key; constant memory, every place found by itself.

    >>> sorted(Permutation(5, key="seed 0, epoch 0")[i] for i in range(5))
    [0, 1, 2, 3, 4]
    """

    def __init__(self, n: int, *, key: str) -> None:
        if n < 0:
            raise ValueError(f"n must be at least 0, not {n}")
        self._n = n
        self._bits = max(((max(n, 1) - 1).bit_length() + 1) // 2, _MIN_HALF_BITS)
        digest = hashlib.shake_256(key.encode()).digest(8 * _ROUNDS)
        self._keys = [int.from_bytes(digest[8 * r : 8 * r + 8], "little") for r in range(_ROUNDS)]

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> int:
        if not 0 <= i < self._n:
            raise IndexError(f"{i} of {self._n}")
        i = self._encipher(i)
        while i >= self._n:  # at most four places a step on average (64 / n below 64)
            i = self._encipher(i)
        return i

    def _encipher(self, i: int) -> int:
        mask = (1 << self._bits) - 1
        left, right = i >> self._bits, i & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return left << self._bits | right


def _mix(x: int) -> int:
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014): 64 bits to 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
