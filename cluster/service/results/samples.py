"""The samples of a step from the run's Parquet files: found, sorted, cut into pages; one with its tokens.

It knows the recorder's columns. Arrow is imported when samples are first asked for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cluster.service.exceptions import InvalidRequestError, NotFoundError, StorageError

Kind: TypeAlias = Literal["step", "eval"]

_COUNTED = ("prompt_tokens", "tokens")
_CONTEXT = 6  # tokens that decide how the next one is written
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_SORTS = ("group", "reward", "advantage", "tokens")


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample, in the order of the recorder's columns; of its tokens only their number."""

    id: str
    group: int
    prompt: list[dict[str, Any]]
    completion: str
    prompt_tokens: int
    tokens: int
    rewards: dict[str, float | None]
    reward: float | None
    valid: bool
    advantage: float | None
    policy_version: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class SamplePage:
    """A page of one step's samples; `steps` have samples, `total` match the query, `rewards` are their names."""

    kind: Kind
    step: int | None
    steps: list[int]
    total: int = 0
    rewards: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SampleTokens:
    """One sample's tokens; all lists are of one length, or null if they are not known."""

    pieces: list[str] | None
    tokens: list[int]
    logprobs: list[float | None]
    kl: list[float | None] | None


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


def find_samples(rollouts: Path, query: Query) -> SamplePage:
    """A page of one step's samples. Raises NotFoundError where the step has none, 422 for an unknown order."""
    steps = sample_steps(rollouts, query.kind)
    step = query.step if query.step is not None else (steps[-1] if steps else None)
    if step is None:
        return SamplePage(query.kind, None, [])
    if step not in steps:
        raise NotFoundError(f"step {step} has no samples")
    samples = _step_samples(*_identified(rollouts, query.kind, step))
    names = list(dict.fromkeys(name for sample in samples for name in sample.rewards))
    if query.sort not in (*_SORTS, *names):
        raise InvalidRequestError(f"sort: expected one of {', '.join((*_SORTS, *names))}")
    wanted = query.text.lower()
    found = [
        sample
        for sample in samples
        if (query.group is None or sample.group == query.group) and (not wanted or wanted in _searched(sample))
    ]
    ordered = _sorted(found, query.sort, descending=query.descending)
    page = ordered[query.offset : query.offset + query.limit]
    return SamplePage(query.kind, step, steps, len(found), names, page)


def sample_tokens(rollouts: Path, *, kind: Kind, step: int, sample_id: str, tokenizer: Path | None) -> SampleTokens:
    """One sample's tokens with their log-probabilities, and their texts where the tokenizer is here."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path, *_ = _identified(rollouts, kind, step)
    table = pq.read_table(path)
    found = table.filter(pc.equal(table["sample_id"], sample_id)).slice(0, 1)
    if not found.num_rows:
        raise NotFoundError(f"step {step} has no sample {sample_id[:100]}")
    tokens, logprobs = (found.column(name)[0].as_py() for name in ("tokens", "logprobs"))
    reference = found.column("ref_logprobs")[0].as_py() if "ref_logprobs" in found.column_names else None
    return SampleTokens(
        pieces=_pieces(tokenizer, tokens) if tokenizer else None,
        tokens=tokens,
        logprobs=[_finite(value) for value in logprobs],
        kl=[_finite(a - b) for a, b in zip(logprobs, reference, strict=True)] if reference else None,
    )


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
def _step_samples(path: Path, changed: int) -> list[Sample]:
    """Every sample of one file, without its tokens; not to be changed."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    names = ["sample_id", *(column.name for column in fields(Sample)[1:])]
    try:
        table = pq.read_table(path, columns=names)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"{path.name} cannot be read: {error}") from error
    # Of tokens their number only: as Python lists those of a step would take gigabytes.
    columns = [pc.list_value_length(table[name]) if name in _COUNTED else table[name] for name in names]
    return [_sample(Sample(*values)) for values in zip(*(column.to_pylist() for column in columns), strict=True)]


def _sample(raw: Sample) -> Sample:
    """As it is shown: the prompt is a JSON text in the file, the rewards are pairs."""
    return replace(
        raw,
        prompt=json.loads(raw.prompt),  # type: ignore[arg-type]
        rewards={name: _finite(score) for name, score in dict(raw.rewards).items()},
        reward=_finite(raw.reward),
        advantage=_finite(raw.advantage),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _searched(sample: Sample) -> str:
    turns = " ".join(str(turn.get("content") or "") for turn in sample.prompt)
    return f"{turns} {sample.completion}".lower()


def _sorted(samples: list[Sample], sort: str, *, descending: bool) -> list[Sample]:
    """By one value; samples without it come last either way."""
    if sort == "group":
        return samples[::-1] if descending else samples
    values = [_value(sample, sort) for sample in samples]
    known = sorted(((value, i) for i, value in enumerate(values) if value is not None), key=_first, reverse=descending)
    unknown = [i for i, value in enumerate(values) if value is None]
    return [samples[i] for i in (*(i for _, i in known), *unknown)]


def _first(pair: tuple[float, int]) -> float:
    return pair[0]


def _value(sample: Sample, sort: str) -> float | None:
    match sort:
        case "reward":
            return sample.reward
        case "advantage":
            return sample.advantage
        case "tokens":
            return sample.tokens
    return sample.rewards.get(sort)
