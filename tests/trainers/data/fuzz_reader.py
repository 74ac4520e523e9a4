"""A coverage-guided fuzz target for the reader (atheris); the suite runs it for seconds, people for hours:

python tests/trainers/data/fuzz_reader.py -max_total_time=3600 CORPUS_FOLDER
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["trainers.data"]):
    from prompt_oracle import compare


def one_input(data: bytes) -> None:
    """The first byte is the size of a block, the others are the file."""
    if data:
        compare(data[1:], block=data[0] + 1)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
