"""A coverage-guided fuzz target for the reader (atheris); the suite runs it for seconds, people for hours:

python -m tests.trainers.data.fuzz_reader -max_total_time=3600 CORPUS_FOLDER
"""

from __future__ import annotations

import resource
import sys

import atheris

with atheris.instrument_imports(include=["trainers.data"]):
    from tests.support.prompt_oracle import compare

MEMORY = 2 << 30  # bytes; the kernel holds it, for libFuzzer's own limit takes the peak of whoever started it for ours


def one_input(data: bytes) -> None:
    """The first byte is the size of a block, the others are the file."""
    if data:
        compare(data[1:], block=data[0] + 1)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    atheris.Setup([*sys.argv, "-rss_limit_mb=0"], one_input)
    atheris.Fuzz()
