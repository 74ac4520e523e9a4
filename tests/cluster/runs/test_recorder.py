"""Metrics, TensorBoard and rollouts: what is written, what a kill tears, what a resume cuts."""

import json
import logging
import math
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.runs.atomic_files import RunDirectoryError
from cluster.runs.metrics_jsonl import read_metrics
from cluster.runs.recorder import Recorder, RolloutRow, rollout_rows
from trainers.types import Completion, Prompt, Rollout, TokenPrompt


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


def rollout(number: int, rewards: tuple[float | None, ...]) -> Rollout:
    prompt = Prompt(messages=({"role": "user", "content": f"Grüß {number}"},), source="p.jsonl", line=number)
    return Rollout(
        prompt=TokenPrompt(id=f"0/{number}", prompt=prompt, tokens=np.array([1, 2, number], dtype=np.int32)),
        completions=tuple(
            Completion(
                tokens=np.arange(index + 1, dtype=np.int32),
                logprobs=np.full(index + 1, -0.5, dtype=np.float32),
                text="x" * (index + 1),
                finish_reason="length" if index else "stop",
                policy_version=7,
            )
            for index in range(len(rewards))
        ),
        rewards={"judge": rewards, "watched": tuple(1.0 for _ in rewards)},
        reward=rewards,
    )


def rows(step: int) -> list[RolloutRow]:
    return rollout_rows(step, [rollout(1, (0.5, None))], {"0/1/0": 1.0})


# --- metrics.jsonl


def test_a_step_is_one_line_in_the_given_order_with_integers_kept(recorder: Recorder, tmp_path: Path) -> None:
    recorder.step({"step": 1, "time": 12.5, "reward/mean": np.float32(0.25), "rollout/tokens": np.int64(640)})
    recorder.step({"step": 2, "reward/mean": 1e-7})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "time": 12.5, "reward/mean": 0.25, "rollout/tokens": 640}\n{"step": 2, "reward/mean": 1e-07}\n'
    )


def test_numbers_come_back_to_the_last_bit(recorder: Recorder, tmp_path: Path) -> None:
    value = float(np.float32(0.1)) + 5e-324
    recorder.step({"step": 1, "x": value, "y": 0.1 + 0.2})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "x": value, "y": 0.1 + 0.2}]


def test_what_json_cannot_say_is_null_and_logged(
    recorder: Recorder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.step({"step": 3, "kl/mean": math.nan, "policy/loss": -math.inf, "policy/lr": 0.0})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 3, "kl/mean": null, "policy/loss": null, "policy/lr": 0.0}\n'
    )
    assert "step 3: not finite, written as null: kl/mean, policy/loss" in caplog.text


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The operating system refuses to write beyond `size` bytes into any file (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_that_does_not_fit_leaves_no_part_of_it(recorder: Recorder, tmp_path: Path) -> None:
    recorder.step({"step": 1})
    # 12 bytes are there; of the next line a part fits, which the operating system writes before it refuses the rest
    with files_no_larger_than(20), pytest.raises(RunDirectoryError, match=r"cannot write .*metrics\.jsonl"):
        recorder.step({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'
    recorder.step({"step": 2})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_line_still_being_written_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


@pytest.mark.parametrize("line", ["not json", "{}", "[1]", '{"step": null}', ""])
def test_a_line_that_is_no_step_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl, line 2: not a step's metrics"):
        read_metrics(tmp_path / "metrics.jsonl")


# --- rollouts


def test_rows_carry_every_completion_with_its_scores_and_advantage() -> None:
    first, second = rollout(1, (0.5, None)), rollout(2, (1.0,))
    made = rollout_rows(4, [first, second], {"0/1/0": 0.25, "0/2/0": -0.25})
    assert [(row.sample_id, row.group, row.reward, row.valid, row.advantage) for row in made] == [
        ("0/1/0", 0, 0.5, True, 0.25),
        ("0/1/1", 0, None, False, None),
        ("0/2/0", 1, 1.0, True, -0.25),
    ]
    assert made[1].rewards == {"judge": None, "watched": 1.0}
    assert json.loads(made[0].prompt) == [{"role": "user", "content": "Grüß 1"}]
    assert made[2].prompt_tokens is second.prompt.tokens


def test_advantages_of_other_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"step 4: advantages of samples that are not in the rollouts: \['0/9/0'\]"):
        rollout_rows(4, [rollout(1, (0.5,))], {"0/9/0": 1.0})


def test_the_parquet_file_holds_what_the_interface_promises(recorder: Recorder, tmp_path: Path) -> None:
    path = recorder.rollouts(1, rows(1))
    assert path == tmp_path / "rollouts" / "step-000001.parquet"
    table = pq.read_table(path)
    assert {name: table.schema.field(name).type for name in ("tokens", "logprobs", "rewards", "step")} == {
        "tokens": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "rewards": pa.map_(pa.string(), pa.float64()),
        "step": pa.int64(),
    }
    assert table.to_pylist()[1] == {
        "step": 1,
        "sample_id": "0/1/1",
        "group": 0,
        "prompt": '[{"role": "user", "content": "Grüß 1"}]',
        "completion": "xx",
        "prompt_tokens": [1, 2, 1],
        "tokens": [0, 1],
        "logprobs": [-0.5, -0.5],
        "ref_logprobs": None,
        "rewards": [("judge", None), ("watched", 1.0)],
        "reward": None,
        "valid": False,
        "advantage": None,
        "policy_version": 7,
        "finish_reason": "length",
    }


def test_the_reference_s_logprobs_are_those_of_the_completion(recorder: Recorder) -> None:
    """Sample 0/1/1 has 3 prompt tokens and 2 of its completion."""
    references = {"0/1/1": np.array([9, 9, 9, -0.75, -0.25], dtype=np.float32)}
    made = recorder.rollouts(1, rollout_rows(1, [rollout(1, (0.5, None))], {}, references))
    assert pq.read_table(made)["ref_logprobs"].to_pylist() == [None, [-0.75, -0.25]]


def test_a_step_without_samples_and_one_without_rewards_are_readable(recorder: Recorder) -> None:
    assert pq.read_table(recorder.rollouts(1, [])).num_rows == 0
    unscored = Rollout(prompt=rollout(1, ()).prompt, completions=(), rewards={}, reward=())
    assert rollout_rows(2, [unscored], {}) == []


def test_a_rollout_file_that_does_not_fit_is_absent_and_named(recorder: Recorder, tmp_path: Path) -> None:
    with files_no_larger_than(500), pytest.raises(RunDirectoryError, match=r"cannot write .*step-000001\.parquet"):
        recorder.rollouts(1, rows(1))
    assert list((tmp_path / "rollouts").iterdir()) == []


# --- resume


def record(recorder: Recorder, steps: range) -> None:
    for step in steps:
        recorder.step({"step": step, "reward/mean": 0.125 * step})
        recorder.rollouts(step, rows(step))


def content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_after_a_resume_the_files_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    record(Recorder(whole), range(1, 7))
    record(Recorder(cut), range(1, 6))
    with (cut / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "rewa')
    (cut / "rollouts" / ".step-000006.parquet.0a1b2c3d.tmp").write_bytes(b"PAR1")
    resumed = Recorder(cut)
    resumed.truncate_after(3)
    assert [line["step"] for line in read_metrics(cut / "metrics.jsonl")] == [1, 2, 3]
    record(resumed, range(4, 7))
    assert content(cut) == content(whole)


def test_a_resume_from_the_start_cuts_everything(recorder: Recorder, tmp_path: Path) -> None:
    record(recorder, range(1, 3))
    recorder.truncate_after(0)
    assert content(tmp_path) == {"metrics.jsonl": b""}


def test_other_files_beside_the_rollouts_stay(recorder: Recorder, tmp_path: Path) -> None:
    recorder.rollouts(2, rows(2))
    (tmp_path / "rollouts" / "notes.txt").touch()
    recorder.truncate_after(1)
    assert set(content(tmp_path)) == {"rollouts/notes.txt"}


def test_metrics_that_end_before_the_checkpoint_are_reported(
    recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    record(recorder, range(1, 3))
    with caplog.at_level(logging.WARNING):
        recorder.truncate_after(2)
        assert caplog.text == ""
        recorder.truncate_after(5)
    assert "ends before step 5" in caplog.text


def test_a_resume_does_not_cut_a_file_that_is_damaged(recorder: Recorder, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('junk\n{"step": 2}\n')
    with pytest.raises(RunDirectoryError, match="line 1"):
        recorder.truncate_after(1)
    assert (tmp_path / "metrics.jsonl").read_text() == 'junk\n{"step": 2}\n'


# --- TensorBoard


@pytest.mark.integration  # imports torch and TensorBoard
def test_tensorboard_shows_the_resumed_run_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Recorder(tmp_path, sinks=("jsonl", "tensorboard")) as first:
        for step in (1, 2, 3):
            first.step({"step": step, "time": 1e9, "reward/mean": 0.25 * step, "kl/mean": math.nan})
    with Recorder(tmp_path, sinks=("jsonl", "tensorboard")) as second:
        second.truncate_after(1)
        for step in (2, 3):
            second.step({"step": step, "reward/mean": -1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.25), (2, -1.0), (3, -1.0)]


def test_without_tensorboard_no_torch_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "import cluster.runs.directory; from cluster.runs.recorder import Recorder\n"
        f"Recorder(Path({str(tmp_path)!r})).step({{'step': 1}})\n"
        "print(sorted({'torch', 'ray', 'vllm', 'deepspeed'} & sys.modules.keys()))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True
    )
    assert (done.stdout, done.returncode) == (b"[]\n", 0)
