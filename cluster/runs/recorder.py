"""What a run records: the metrics of each step, in every sink that is configured, and every rollout as Parquet.

It knows the data types of `trainers` and the protocol of a metrics sink. After a resume the files are those of a run
that was never interrupted.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.runs.atomic_files import explained, remove_temporaries, replacing
from cluster.runs.metrics_sinks import make_sinks
from trainers.types import FinishReason, Float32Array, Int32Array, Rollout, to_samples

logger = logging.getLogger(__name__)

_ROLLOUT_FILE: Final = re.compile(r"(?:step|eval)-(\d{6,})\.parquet")
_SCHEMA: Final = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("group", pa.int64(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("prompt_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("ref_logprobs", pa.list_(pa.float32())),
        pa.field("rewards", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("reward", pa.float64()),
        pa.field("valid", pa.bool_(), nullable=False),
        pa.field("advantage", pa.float64()),
        pa.field("policy_version", pa.int64(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRow:
    """One sample of a step, as `rollouts/step-000001.parquet` has it; one column a field."""

    step: int
    sample_id: str
    group: int  # samples of one prompt share it
    prompt: str  # the messages as JSON
    completion: str
    prompt_tokens: Int32Array  # [P]
    tokens: Int32Array  # [C], the completion's
    logprobs: Float32Array  # [C], the generator's
    ref_logprobs: Float32Array | None = None  # [C], the reference's; None where the run needs none
    rewards: Mapping[str, float | None]  # raw scores by source; None: could not be scored
    reward: float | None  # the weighted sum that is trained on; None where not valid
    valid: bool
    advantage: float | None  # None: the sample was not trained on
    policy_version: int
    finish_reason: FinishReason


def rollout_rows(
    step: int,
    rollouts: Sequence[Rollout],
    advantages: Mapping[str, float],
    references: Mapping[str, Float32Array] | None = None,
) -> list[RolloutRow]:
    """One row for every completion, in the order of `trainers.types.to_samples`.

    `advantages` maps sample ids to advantages, `references` to the reference's log-probabilities [T] of prompt and
    completion. Raises `ValueError` where it names a sample that is not among them.
    """
    completions = [(rollout, index) for rollout in rollouts for index in range(len(rollout.completions))]
    samples = to_samples(rollouts)
    if unknown := advantages.keys() - {sample.id for sample in samples}:
        raise ValueError(f"step {step}: advantages of samples that are not in the rollouts: {sorted(unknown)[:3]}")
    return [
        RolloutRow(
            step=step,
            sample_id=sample.id,
            group=sample.group,
            prompt=json.dumps(rollout.prompt.prompt.messages, ensure_ascii=False),
            completion=rollout.completions[index].text,
            prompt_tokens=rollout.prompt.tokens,
            tokens=rollout.completions[index].tokens,
            logprobs=rollout.completions[index].logprobs,
            ref_logprobs=_of_completion(rollout, (references or {}).get(sample.id)),
            rewards={name: scores[index] for name, scores in rollout.rewards.items()},
            reward=rollout.reward[index],
            valid=sample.valid,
            advantage=advantages.get(sample.id),
            policy_version=sample.policy_version,
            finish_reason=rollout.completions[index].finish_reason,
        )
        for (rollout, index), sample in zip(completions, samples, strict=True)
    ]


def _of_completion(rollout: Rollout, values: Float32Array | None) -> Float32Array | None:
    return None if values is None else values[len(rollout.prompt.tokens) :]


class Recorder:
    """Writes a run's metrics and rollouts, durably, one step after the other. Raises `RunDirectoryError`."""

    def __init__(self, directory: Path, *, sinks: Sequence[str] = ("jsonl",)) -> None:
        self._rollouts = directory / "rollouts"
        self._sinks = make_sinks(sinks, directory)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step to every sink, keys in the given order.

        `metrics["step"]` is the step's number. A number that is not finite (NaN, infinity) becomes None, and is logged.
        """
        step = int(metrics["step"])
        values = {key: _number(value) for key, value in metrics.items()}
        if absent := [key for key, value in values.items() if value is None]:
            logger.warning("step %d: not finite, written as null: %s", step, ", ".join(absent))
        for sink in self._sinks:
            sink.write(step, values)

    def rollouts(self, step: int, rows: Sequence[RolloutRow], *, kind: Literal["step", "eval"] = "step") -> Path:
        """Writes samples to `rollouts/step-000001.parquet` (an evaluation's to `eval-…`), complete or not at all."""
        columns = {name: [_cell(getattr(row, name)) for row in rows] for name in _SCHEMA.names}
        path = self._rollouts / f"{kind}-{step:06d}.parquet"
        with explained(path):
            self._rollouts.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            pq.write_table(pa.table(columns, schema=_SCHEMA), temporary, compression="zstd")
        return path

    def truncate_after(self, step: int) -> None:
        """Removes what was recorded after `step`, from which a run resumes (below 0: all of it).

        Call it before the first `step`. A sink logs if its metrics end before `step`: they were removed or damaged by
        something else.
        """
        for sink in self._sinks:
            sink.truncate_after(step)
        if self._rollouts.is_dir():
            remove_temporaries(self._rollouts)
            for path in self._rollouts.iterdir():
                match = _ROLLOUT_FILE.fullmatch(path.name)
                if match and int(match[1]) > step:
                    with explained(path):
                        path.unlink()

    def close(self) -> None:
        """Closes the sinks; rollouts are on the disk already."""
        for sink in self._sinks:
            sink.close()


def _number(value: Any) -> float | None:
    """The number as JSON has it, integers kept; None if it is not finite."""
    number = int(value) if isinstance(value, Integral) else float(value)
    return number if math.isfinite(number) else None


def _cell(value: Any) -> Any:
    return list(value.items()) if isinstance(value, Mapping) else value
