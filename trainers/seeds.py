"""Seeds by purpose: every draw of a run has a seed of its own, so that nothing depends on what was drawn before.

Pure. A resumed run therefore restores only the learners' random number generators.
"""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 62-bit seed for one purpose, such as ("sample", prompt id, index).

    >>> derive_seed(0, "sample", "e0-000001", 0) != derive_seed(0, "sample", "e0-000001", 1)
    True
    """
    text = "\x1f".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2
