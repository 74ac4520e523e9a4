"""What a run reports while it trains: `metrics.jsonl`, TensorBoard scalars, and every rollout as Parquet.

It knows the data types of `trainers` and the run's files; TensorBoard (and torch with it) is imported when the first
step is recorded, if it is wanted. After a resume the files are those of a run that was never interrupted.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.runs.atomic_files import RunDirectoryError, explained, fsync, remove_temporaries, replacing, write_atomic
from cluster.runs.daemon_threads import start
from trainers.types import FinishReason, Float32Array, Int32Array, Rollout, to_samples

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

_CLOSE_S = 60.0

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

    def __init__(self, directory: Path, *, tensorboard: bool = True) -> None:
        self._metrics = directory / "metrics.jsonl"
        self._rollouts = directory / "rollouts"
        self._tensorboard = directory / "tensorboard" if tensorboard else None
        self._writer: SummaryWriter | None = None
        self._resumed_at: int | None = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, metrics: Mapping[str, float]) -> None:
        """Appends one line to `metrics.jsonl`, keys in the given order, and the scalars to TensorBoard.

        `metrics["step"]` is the step's number. A number that JSON does not have (NaN, infinity) becomes null, and
        is logged. The line is on the disk when this returns, or not in the file at all.
        """
        step = int(metrics["step"])
        values = {key: _number(value) for key, value in metrics.items()}
        if absent := [key for key, value in values.items() if value is None]:
            logger.warning("step %d: not finite, written as null: %s", step, ", ".join(absent))
        self._append(json.dumps(values, allow_nan=False, ensure_ascii=False).encode() + b"\n")
        self._scalars(step, values)

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
        """Cuts what was recorded after `step`, from which a run resumes (below 0: all of it).

        A last line that a kill tore is cut too. Call it before the first `step`. Logs where the metrics end
        before `step`: they were removed or damaged by something else.
        """
        assert self._writer is None, "truncate_after comes before the first step"
        self._resumed_at = step
        kept = [line for line in _complete_lines(self._metrics) if line[0] <= step]
        if self._metrics.exists():
            write_atomic(self._metrics, b"".join(raw for _, raw in kept))
        if step > 0 and (not kept or kept[-1][0] != step):
            logger.warning("%s ends before step %d, from which the run resumes", self._metrics, step)
        if self._rollouts.is_dir():
            remove_temporaries(self._rollouts)
            for path in self._rollouts.iterdir():
                match = _ROLLOUT_FILE.fullmatch(path.name)
                if match and int(match[1]) > step:
                    with explained(path):
                        path.unlink()

    def close(self) -> None:
        """Ends the TensorBoard file; metrics and rollouts are on the disk already."""
        if self._writer is not None:
            try:
                start(self._writer.close).result(timeout=_CLOSE_S)
            except TimeoutError:
                logger.warning("%s was not closed within %g s; is its file system hung?", self._tensorboard, _CLOSE_S)
            self._writer = None

    def _append(self, line: bytes) -> None:
        with explained(self._metrics):
            created = not self._metrics.exists()
            descriptor = os.open(self._metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                size = os.fstat(descriptor).st_size
                try:
                    _write_all(descriptor, line)
                    os.fsync(descriptor)
                except OSError:
                    os.ftruncate(descriptor, size)
                    raise
            finally:
                os.close(descriptor)
            if created:
                fsync(self._metrics.parent)

    def _scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        if self._tensorboard is None:
            return
        with explained(self._tensorboard):
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                # TensorBoard hides what an earlier file of the run holds from purge_step on.
                purge_step = None if self._resumed_at is None else self._resumed_at + 1
                self._writer = SummaryWriter(str(self._tensorboard), purge_step=purge_step)
            for key, value in values.items():
                if key not in ("step", "time") and value is not None:
                    self._writer.add_scalar(key, value, step)
            self._writer.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps in a `metrics.jsonl`, in order; a last line that is still being written, or was torn, is left out.

    Raises `RunDirectoryError` naming the line if another one is not a step. A missing file has no steps.

    >>> read_metrics(Path("nowhere/metrics.jsonl"))
    []
    """
    return [json.loads(raw) for _, raw in _complete_lines(path)]


def _complete_lines(path: Path) -> list[tuple[int, bytes]]:
    """(step, line with its end) of every complete line."""
    if not path.exists():
        return []
    with explained(path):
        lines = path.read_bytes().splitlines(keepends=True)
    found = []
    for number, raw in enumerate(lines, start=1):
        if not raw.endswith(b"\n"):
            continue  # the last one
        try:
            found.append((int(json.loads(raw)["step"]), raw))
        except (ValueError, TypeError, KeyError) as error:
            message = f"{path}, line {number}: not a step's metrics ({error}); remove the line, or restore the file"
            raise RunDirectoryError(message) from error
    return found


def _number(value: Any) -> float | None:
    """The number as JSON has it, integers kept; None where it is not finite."""
    number = int(value) if isinstance(value, Integral) else float(value)
    return number if math.isfinite(number) else None


def _cell(value: Any) -> Any:
    return list(value.items()) if isinstance(value, Mapping) else value


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
