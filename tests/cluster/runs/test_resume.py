"""Which run `--resume auto` continues, and which keys make another run of a config."""

from pathlib import Path

import pytest

from cluster.runs.checkpoint import CheckpointStore, DriverState
from cluster.runs.directory import RunDirectory
from cluster.runs.resume import find_resumable, resume_differences
from tests.support.fake_runs import make_config
from tests.support.small_config import EvalConfig, RewardConfig, RunConfig, create
from trainers.config import SamplingConfig, TrainConfig
from trainers.errors import Problem


def checkpointed(root: Path, config: RunConfig | None = None, *, step: int = 10) -> RunDirectory:
    run = create(root, config)
    store = CheckpointStore(run.checkpoints, keep=1)
    (store.begin(step) / "rank-0.pt").write_bytes(b"weights")
    store.commit(step, DriverState(step=step, policy_version=step, kl={}, stream={}, scorer={}))
    run.update(state="running", step=step)
    return run


def test_the_newest_fitting_run_with_a_checkpoint_is_resumed(tmp_path: Path) -> None:
    checkpointed(tmp_path)
    newest = checkpointed(tmp_path)
    create(tmp_path)  # has no checkpoint
    checkpointed(tmp_path, RunConfig(name="other"))
    found = find_resumable(tmp_path, RunConfig())
    assert found is not None
    assert found.path == newest.path
    assert find_resumable(tmp_path, RunConfig(name="third")) is None
    assert find_resumable(tmp_path / "nowhere", RunConfig()) is None


def test_what_may_change_does_not_hinder(tmp_path: Path) -> None:
    run = checkpointed(tmp_path)
    changed = RunConfig(
        root="elsewhere",
        eval=EvalConfig(every=1),
        train=TrainConfig(steps=21),
        rewards=(RewardConfig(path="r.py:reward", timeout_s=99),),
    )
    found = find_resumable(tmp_path, changed)
    assert found is not None
    assert found.path == run.path


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (RunConfig(seed=1), "seed: 0 in the saved run, 1 now"),
        (RunConfig(train=TrainConfig(steps=19)), "train.steps: 20 in the saved run, 19 now"),
        (
            RunConfig(train=TrainConfig(steps=20, learning_rate=1e-5)),
            "train.learning_rate: 1e-06 in the saved run, 1e-05",
        ),
        (
            RunConfig(sampling=SamplingConfig(stop=("\n",))),
            "sampling.stop: [] in the saved run, absent now; sampling.stop.0",
        ),
        (
            RunConfig(rewards=(RewardConfig(path="r.py:other"),)),
            "rewards.0.path: r.py:reward in the saved run, r.py:other",
        ),
    ],
)
def test_a_run_that_differs_is_not_resumed_and_the_keys_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changed: RunConfig, difference: str
) -> None:
    run = checkpointed(tmp_path)
    assert find_resumable(tmp_path, changed) is None
    assert f"run {run.path.name} is not resumed, its config differs: {difference}" in caplog.text


def test_a_run_that_succeeded_is_resumed_only_for_more_steps(tmp_path: Path) -> None:
    run = checkpointed(tmp_path, step=20)
    run.update(state="succeeded")
    assert find_resumable(tmp_path, RunConfig()) is None
    found = find_resumable(tmp_path, RunConfig(train=TrainConfig(steps=30)))
    assert found is not None
    assert found.path == run.path


def test_a_checkpoint_without_a_manifest_does_not_count(tmp_path: Path) -> None:
    run = checkpointed(tmp_path)
    (run.checkpoints / "step-000010" / "manifest.json").unlink()
    assert find_resumable(tmp_path, RunConfig()) is None


def test_a_run_whose_config_cannot_be_read_is_passed_over_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = checkpointed(tmp_path), checkpointed(tmp_path)
    (newer.path / "config.yaml").unlink()
    found = find_resumable(tmp_path, RunConfig())
    assert found is not None
    assert found.path == older.path
    assert f"run {newer.path.name} is not resumed" in caplog.text


def test_a_resumed_run_keeps_the_config_that_it_goes_on_with(tmp_path: Path) -> None:
    run = checkpointed(tmp_path)
    longer = RunConfig(train=TrainConfig(steps=50))
    run.write_config(longer)
    assert run.config() == longer.model_dump(mode="json")


class NewerTrainConfig(TrainConfig):
    averaged: bool = False


class NewerRunConfig(RunConfig):
    """As a later release has it: keys and a section with defaults were added."""

    train: NewerTrainConfig = NewerTrainConfig(steps=20)
    eval: EvalConfig = EvalConfig()
    replay: SamplingConfig = SamplingConfig()
    compile: bool = False


def test_a_release_that_adds_keys_with_defaults_resumes_what_an_older_one_began(tmp_path: Path) -> None:
    run = checkpointed(tmp_path)
    found = find_resumable(tmp_path, NewerRunConfig())
    assert found is not None
    assert found.path == run.path


@pytest.mark.parametrize(
    ("newer", "difference"),
    [
        (NewerRunConfig(compile=True), "compile: False in the saved run, True now"),
        (NewerRunConfig(seed=1), "seed: 0 in the saved run, 1 now"),
        (
            NewerRunConfig(train=NewerTrainConfig(steps=20, averaged=True)),
            "train.averaged: False in the saved run, True now",
        ),
    ],
)
def test_a_real_difference_is_refused_by_a_newer_release_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, newer: NewerRunConfig, difference: str
) -> None:
    run = checkpointed(tmp_path)
    assert find_resumable(tmp_path, newer) is None
    assert f"run {run.path.name} is not resumed, its config differs: {difference}" in caplog.text


def test_keys_that_a_release_removed_or_requires_are_differences() -> None:
    saved = {**RunConfig().model_dump(mode="json"), "gone": {"a": 1}}
    saved["train"] = {**saved["train"], "steps": 0}
    saved["rewards"] = [{"timeout_s": 5.0}]
    found = resume_differences(saved, RunConfig())
    assert found == [
        Problem("train.steps", "0 in the saved run, not accepted now (Input should be greater than or equal to 1)"),
        Problem("rewards.0.path", "absent in the saved run, required now"),
        Problem("gone", "{'a': 1} in the saved run, is not a key now"),
    ]


def test_sections_that_a_resume_may_change_are_not_read_from_the_saved_run() -> None:
    saved = {**RunConfig().model_dump(mode="json"), "eval": {"gone": 1}, "generators": {"replicas": 2}, "logging": 3}
    assert resume_differences(saved, RunConfig()) == []


def test_the_tag_of_a_section_of_several_kinds_is_not_part_of_a_keys_name(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    saved = config.model_dump(mode="json")
    saved["algorithm"]["gone"] = 1
    assert resume_differences(saved, config) == [Problem("algorithm.gone", "1 in the saved run, is not a key now")]


def test_a_run_whose_record_cannot_be_read_is_passed_over_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = checkpointed(tmp_path), checkpointed(tmp_path)
    (bad.path / "run.json").write_text("")
    found = find_resumable(tmp_path, RunConfig())
    assert found is not None
    assert found.path == good.path
    assert f"run {bad.path.name} is not resumed" in caplog.text
