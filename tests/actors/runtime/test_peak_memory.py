"""What a process reports of its own memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from actors.runtime.actor_group import peak_memory

CHILD = """
from actors.runtime.actor_group import peak_memory
before = peak_memory()
held = bytearray(300 << 20)
held[:: 4096] = bytes(len(held) // 4096)
del held
print(before, peak_memory())
"""


def test_a_peak_is_a_processs_own_and_stays_when_memory_is_given_back() -> None:
    """Started by one that holds 1 GiB, it has not had them itself."""
    held = np.ones(1 << 30, dtype=np.uint8)
    assert peak_memory() > held.nbytes
    said = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, timeout=120)
    before, after = map(int, said.stdout.split())
    assert before < 1 << 29
    assert 280 << 20 < after - before < 320 << 20
