"""AdaLoRA's ranks at the end of a run, from the adapter as PEFT saved it. It knows JSON only, nothing of torch.

PEFT keeps them in `adapter_config.json` as `rank_pattern`: for each adapted layer (`….q_proj.lora_E`) a list of
booleans, one for each of its `init_r` singular values, true where it was kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class LayerRank:
    """What one adapted layer was given."""

    layer: int | None  # the transformer layer's number; None: it belongs to none
    module: str  # within it
    rank: int


@dataclass(frozen=True, slots=True)
class RankTable:
    """The ranks of a run's adapter."""

    init_r: int  # of every layer at the beginning
    target_r: int  # the mean that was asked for
    layers: tuple[LayerRank, ...]

    def as_json(self) -> dict[str, Any]:
        """For `rlhf runs show --json`."""
        layers = [{"layer": each.layer, "module": each.module, "rank": each.rank} for each in self.layers]
        return {"init_r": self.init_r, "target_r": self.target_r, "layers": layers}

    def lines(self) -> list[str]:
        """A line for each transformer layer, a column for each module.

        >>> layers = (LayerRank(0, "self_attn.q_proj", 5), LayerRank(0, "mlp.up_proj", 1))
        >>> print("\\n".join(RankTable(5, 3, layers).lines()))
        layer  q_proj  up_proj
            0       5        1
        mean 3 of 5
        """
        rows: dict[int | None, dict[str, int]] = {}
        for each in self.layers:
            rows.setdefault(each.layer, {})[each.module] = each.rank
        modules = list(dict.fromkeys(each.module for each in self.layers))
        head = ["layer", *_short(modules)]
        body = [
            ["" if layer is None else str(layer), *(str(ranks.get(m, "")) for m in modules)]
            for layer, ranks in rows.items()
        ]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        text = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *body]]
        mean = sum(each.rank for each in self.layers) / len(self.layers)
        return [*text, f"mean {mean:.3g} of {self.init_r}"]


def read_ranks(model: Path) -> RankTable | None:
    """The ranks of the adapter in a run's `model/`; None where there is none of adaptive rank, or none fell yet."""
    try:
        config = json.loads((model / "adapter_config.json").read_text(encoding="utf-8"))
        pattern = config.get("rank_pattern") or {}
        if config.get("peft_type") != "ADALORA" or not pattern:
            return None
        layers = sorted((_layer(name, sum(kept)) for name, kept in pattern.items()), key=_place)  # the file: 0, 1, 10
        return RankTable(int(config["init_r"]), int(config["target_r"]), tuple(layers))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # shown beside a run: never its end
        return None


def _layer(name: str, rank: int) -> LayerRank:
    """Of a name such as `model.layers.3.mlp.up_proj.lora_E`: the number, and what follows it."""
    parts = name.split(".lora_E")[0].split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return (
        LayerRank(None, ".".join(parts), rank)
        if at is None
        else LayerRank(int(parts[at]), ".".join(parts[at + 1 :]), rank)
    )


def _place(each: LayerRank) -> tuple[bool, int]:
    return each.layer is None, each.layer or 0


def _short(modules: Sequence[str]) -> list[str]:
    """Last parts of the names, where these tell them apart."""
    short = [module.rpartition(".")[2] for module in modules]
    return short if len(set(short)) == len(short) else list(modules)
