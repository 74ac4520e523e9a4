"""The samples of a step from the run's Parquet files: found, sorted, cut into pages; one with its tokens.

It knows the recorder's columns. Arrow is imported when samples are first asked for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cluster.service.exceptions import InvalidRequestError, NotFoundError, StorageError

Kind: TypeAlias = Literal["step", "eval"]

_COLUMNS = (
    "sample_id",
    "group",
    "prompt",
    "completion",
    "prompt_tokens",
    "tokens",
    "rewards",
    "reward",
    "valid",
    "advantage",
    "policy_version",
    "finish_reason",
)
_COUNTED = ("prompt_tokens", "tokens")
_CONTEXT = 6  # tokens that decide how the next one is written
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_SORTS = ("group", "reward", "advantage", "tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Which samples, in which order."""

    kind: Kind = "step"
    step: int | None = None
    text: str = ""
    group: int | None = None
    sort: str = "group"
    descending: bool = False
    limit: int = 50
    offset: int = 0


def sample_steps(rollouts: Path, kind: Kind) -> list[int]:
    """Steps that have samples, in order."""
    pattern = re.compile(rf"{kind}-(\d{{6,}})\.parquet")
    matches = (pattern.fullmatch(path.name) for path in rollouts.glob(f"{kind}-*.parquet"))
    return sorted(int(match[1]) for match in matches if match)


def find_samples(rollouts: Path, query: Query) -> dict[str, Any]:
    """A page of one step's samples. Raises NotFoundError where the step has none, 422 for an unknown order."""
    steps = sample_steps(rollouts, query.kind)
    step = query.step if query.step is not None else (steps[-1] if steps else None)
    if step is None:
        return {"kind": query.kind, "step": None, "steps": [], "total": 0, "rewards": [], "samples": []}
    if step not in steps:
        raise NotFoundError(f"step {step} has no samples")
    samples = _step_samples(*_identified(rollouts, query.kind, step))
    names = list(dict.fromkeys(name for sample in samples for name in sample["rewards"]))
    if query.sort not in (*_SORTS, *names):
        raise InvalidRequestError(f"sort: expected one of {', '.join((*_SORTS, *names))}")
    wanted = query.text.lower()
    found = [
        sample
        for sample in samples
        if (query.group is None or sample["group"] == query.group) and (not wanted or wanted in _searched(sample))
    ]
    ordered = _sorted(found, query.sort, descending=query.descending)
    page = ordered[query.offset : query.offset + query.limit]
    return {
        "kind": query.kind,
        "step": step,
        "steps": steps,
        "total": len(found),
        "rewards": names,
        "samples": page,
    }


def sample_tokens(rollouts: Path, *, kind: Kind, step: int, sample_id: str, tokenizer: Path | None) -> dict[str, Any]:
    """One sample's tokens with their log-probabilities, and their texts where the tokenizer is here."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path, *_ = _identified(rollouts, kind, step)
    table = pq.read_table(path)
    rows = table.filter(pc.equal(table["sample_id"], sample_id)).to_pylist()
    if not rows:
        raise NotFoundError(f"step {step} has no sample {sample_id[:100]}")
    row = rows[0]
    reference = row.get("ref_logprobs")
    kl = [_finite(a - b) for a, b in zip(row["logprobs"], reference, strict=True)] if reference else None
    pieces = _pieces(tokenizer, row["tokens"]) if tokenizer else None
    return {"pieces": pieces, "tokens": row["tokens"], "logprobs": [_finite(v) for v in row["logprobs"]], "kl": kl}


def _pieces(tokenizer: Path, tokens: Sequence[int]) -> list[str]:
    """Each token's text; joined they are the completion (a character may be split over tokens)."""
    loaded = _tokenizer(tokenizer, tokenizer.stat().st_mtime_ns)
    texts = []
    for end in range(1, len(tokens) + 1):
        window = list(tokens[max(0, end - _CONTEXT) : end])
        before = loaded.decode(window[:-1], skip_special_tokens=False).rstrip(_UNFINISHED)
        now = loaded.decode(window, skip_special_tokens=False)
        unfinished = now.endswith(_UNFINISHED) and end < len(tokens)
        texts.append(now[len(before) :] if now.startswith(before) and not unfinished else "")
    return texts


@lru_cache(maxsize=4)
def _tokenizer(path: Path, changed: int) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def _identified(rollouts: Path, kind: Kind, step: int) -> tuple[Path, int]:
    path = rollouts / f"{kind}-{step:06d}.parquet"
    try:
        return path, path.stat().st_mtime_ns
    except OSError:
        raise NotFoundError(f"step {step} has no samples") from None


@lru_cache(maxsize=4)
def _step_samples(path: Path, changed: int) -> list[dict[str, Any]]:
    """Every sample of one file, without its tokens; not to be changed."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=list(_COLUMNS))
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"{path.name} cannot be read: {error}") from error
    for name in _COUNTED:  # their lengths only: as Python lists the tokens of a step would take gigabytes
        table = table.set_column(table.schema.get_field_index(name), name, pc.list_value_length(table[name]))
    return [_sample(row) for row in table.to_pylist()]


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": row["sample_id"],
        "group": row["group"],
        "prompt": json.loads(row["prompt"]),
        "completion": row["completion"],
        "prompt_tokens": row["prompt_tokens"],
        "tokens": row["tokens"],
        "rewards": {name: _finite(score) for name, score in row["rewards"]},
        "reward": _finite(row["reward"]),
        "valid": row["valid"],
        "advantage": _finite(row["advantage"]),
        "policy_version": row["policy_version"],
        "finish_reason": row["finish_reason"],
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _searched(sample: Mapping[str, Any]) -> str:
    turns = " ".join(str(turn.get("content") or "") for turn in sample["prompt"])
    return f"{turns} {sample['completion']}".lower()


def _sorted(samples: list[dict[str, Any]], sort: str, *, descending: bool) -> list[dict[str, Any]]:
    """By one value; samples without it come last either way."""
    if sort == "group":
        return samples[::-1] if descending else samples
    values = [sample[sort] if sort in _SORTS else sample["rewards"].get(sort) for sample in samples]
    known = [i for i, value in enumerate(values) if value is not None]
    unknown = [i for i, value in enumerate(values) if value is None]
    known.sort(key=lambda i: values[i], reverse=descending)
    return [samples[i] for i in (*known, *unknown)]
