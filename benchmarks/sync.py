"""What a weight sync moves and takes: all weights beside an adapter of rank 8 on every linear layer, by model width.

    python -m benchmarks.sync [--widths 192 512 1024] [--markdown FILE]

Real runs of three GRPO steps on untaught models; a sync is gathering, sending, loading, digests and canaries. Full
weights of width h count about 12·h² a layer, the adapter's about 18·8·h: the ratio grows with h / 12.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.matrix import Cell, prepare, run_cell
from trainers.tiny_models import make_random_policy

STEPS, LAYERS = 3, 4
SMALL = ("sampling.n=2", "train.prompts_per_step=4", "learners.workers=1", "eval.n=1", "eval.max_prompts=4")


def measure(width: int, root: Path) -> str:
    """A row of the table."""
    policy = root / f"policy-{width}"
    make_random_policy(policy, layers=LAYERS, hidden=width)
    full, adapter = (
        run_cell(name, root / str(width), steps=STEPS, more=(*SMALL, f"policy.model={policy}"))
        for name in ("grpo-full", "grpo-lora")
    )
    return f"| {width} | {_moved(full)} | {_moved(adapter)} | {_ratio(full, adapter)} |"


def _moved(cell: Cell) -> str:
    return f"{cell.typical('weights/sync_bytes') / 2**10:,.0f} KiB in {cell.typical('weights/sync_s'):.2f} s"


def _ratio(full: Cell, adapter: Cell) -> str:
    of = {key: full.typical(f"weights/{key}") / adapter.typical(f"weights/{key}") for key in ("sync_bytes", "sync_s")}
    return f"{of['sync_bytes']:.1f} | {of['sync_s']:.1f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=(192, 512, 1024), help="multiples of 64")
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    options = parser.parse_args()
    prepare()
    rows = ["| width | full | adapter, rank 8 | × fewer bytes | × quicker |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as root:
        for width in options.widths:
            rows.append(measure(width, Path(root)))
            print(rows[-1], flush=True)
    print(report := "\n".join(rows))
    if options.markdown is not None:
        options.markdown.write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
