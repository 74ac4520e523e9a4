"""A run's directory: layout, record, lock, and which run `--resume auto` continues."""

import importlib.metadata
import json
import math
import os
import re
import resource
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.runs.checkpoint import CheckpointStore, DriverState
from cluster.runs.directory import (
    RunDirectory,
    RunError,
    find_resumable,
    list_runs,
    new_run_id,
    package_versions,
    resume_differences,
)
from tests.support.fake_runs import make_config
from trainers.config import Config, SamplingConfig, TrainConfig
from trainers.errors import Problem, UserError


class EvalConfig(Config):
    every: int = 10


class RewardConfig(Config):
    path: str
    timeout_s: float = 10.0


class RunConfig(Config):
    name: str = "haiku"
    seed: int = 0
    root: str = "runs"
    sampling: SamplingConfig = SamplingConfig()
    train: TrainConfig = TrainConfig(steps=20)
    eval: EvalConfig = EvalConfig()
    rewards: tuple[RewardConfig, ...] = (RewardConfig(path="r.py:reward"),)


def create(root: Path, config: RunConfig | None = None) -> RunDirectory:
    config = config or RunConfig()
    return RunDirectory.create(root, config.name, config)


def checkpointed(root: Path, config: RunConfig | None = None, *, step: int = 10) -> RunDirectory:
    run = create(root, config)
    store = CheckpointStore(run.checkpoints, keep=1)
    (store.begin(step) / "rank-0.pt").write_bytes(b"weights")
    store.commit(step, DriverState(step=step, policy_version=step, kl={}, stream={}, scorer={}))
    run.update(state="running", step=step)
    return run


# --- creation


def test_a_new_run_has_its_config_its_record_and_nothing_else(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    run = create(tmp_path / "deep" / "runs", RunConfig(seed=7))
    assert {path.name for path in run.path.iterdir()} == {"config.yaml", "run.json", "rollouts", "checkpoints", "logs"}
    assert list((tmp_path / "deep" / "runs").iterdir()) == [run.path]
    assert run.config() == RunConfig(seed=7).model_dump(mode="json")
    assert yaml.safe_load((run.path / "config.yaml").read_text())["train"]["learning_rate"] == 1e-6
    record = RunDirectory.open(run.path).record()
    assert (record.id, record.name, record.state, record.step, record.steps) == (
        run.path.name,
        "haiku",
        "queued",
        0,
        20,
    )
    assert before <= record.created <= datetime.now(UTC)
    assert record.versions["pyarrow"] == importlib.metadata.version("pyarrow")
    assert record.versions["python"] == ".".join(map(str, sys.version_info[:3]))


def test_times_are_written_as_utc_iso_8601(tmp_path: Path) -> None:
    written = json.loads((create(tmp_path).path / "run.json").read_bytes())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", written["created"])
    assert written["started"] is None


@given(st.text(max_size=100), st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(2100, 1, 1)))
def test_a_run_id_is_safe_whatever_the_name(name: str, now: datetime) -> None:
    made = new_run_id(name, now.replace(tzinfo=UTC))
    assert re.fullmatch(r"\d{8}-\d{6}-[a-z0-9]+(-[a-z0-9]+)*-[0-9a-f]{6}", made)
    assert len(made) <= 63
    assert made < new_run_id(name, now.replace(tzinfo=UTC) + timedelta(seconds=1))


@settings(max_examples=40, deadline=None)
@example(name="\x85", number=math.inf)
@given(name=st.text(alphabet=st.characters(exclude_categories=["Cs"])), number=st.floats(allow_nan=False))
def test_the_config_file_gives_back_every_text_and_number(
    tmp_path_factory: pytest.TempPathFactory, name: str, number: float
) -> None:
    config = RunConfig(rewards=(RewardConfig(path=name, timeout_s=number),))
    run = create(tmp_path_factory.mktemp("root"), config)
    assert run.config() == config.model_dump(mode="json")


def test_two_runs_of_one_name_at_one_time_are_two(tmp_path: Path) -> None:
    runs = {create(tmp_path).path for _ in range(20)}
    assert len(runs) == 20
    assert [run.path for run in list_runs(tmp_path)] == sorted(runs, key=lambda p: RunDirectory(p).record().created)


def test_a_root_that_cannot_be_is_a_user_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"root: cannot write .*runs.*choose another `root`"):
        create(tmp_path / "runs")
    with pytest.raises(UserError, match=r"root: cannot write .* a part of the path is a file"):
        create(tmp_path / "runs" / "deep")
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]


def test_a_run_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # config.yaml is longer
    try:
        with pytest.raises(UserError, match=r"root: cannot write .*config\.yaml"):
            create(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_root_without_the_right_to_write_is_a_user_error(tmp_path: Path) -> None:
    """In a forked process without rights, because the tests may run as root."""
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            else:
                tmp_path.chmod(0o500)
            create(tmp_path)
        except UserError as error:
            os._exit(0 if "permission denied; give this user the right" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_too_little_space_is_said_in_figures(tmp_path: Path) -> None:
    run = create(tmp_path)
    run.check_space(1)
    with pytest.raises(
        UserError, match=r"root: too little space at .*: 1,048,576,000 MiB are needed, [\d,]+ MiB are free"
    ):
        run.check_space(1_000 * 2**40)


# --- the record


def test_times_follow_the_state(tmp_path: Path) -> None:
    run = create(tmp_path)
    running = run.update(state="running")
    assert running.started is not None
    assert running.ended is None
    failed = run.update(
        state="failed",
        step=3,
        error=RunError(
            role="learner", rank=1, phase="train", type="OutOfMemoryError", message="no memory", log="l.log"
        ),
    )
    assert failed.ended is not None
    assert failed.ended >= running.started
    again = run.update(state="running", error=None, steps=40, headline={"reward/mean": 0.5})
    assert (again.started, again.ended, again.error, again.steps) == (running.started, None, None, 40)
    assert run.record() == again
    assert again.step == 3


def test_a_change_that_is_no_state_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    run = create(tmp_path)
    before = (run.path / "run.json").read_bytes()
    changes: list[dict[str, Any]] = [{"state": "done"}, {"step": -1}, {"headline": {"x": math.nan}}, {"progress": 1}]
    for change in changes:
        with pytest.raises(ValidationError):
            run.update(**change)
    assert (run.path / "run.json").read_bytes() == before


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: is no run's directory: it holds no run\.json"):
        RunDirectory.open(tmp_path / "nowhere")
    run = create(tmp_path)
    (run.path / "run.json").write_text('{"id": ')
    with pytest.raises(UserError, match=r"run\.json: cannot be read"):
        RunDirectory.open(run.path)
    (run.path / "config.yaml").write_text("- a\n")
    with pytest.raises(UserError, match=r"config\.yaml: holds a list"):
        run.config()
    (run.path / "config.yaml").write_text("{")
    with pytest.raises(UserError, match=r"config\.yaml: cannot be read"):
        run.config()


def test_an_unreadable_run_is_left_out_of_the_list_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = create(tmp_path), create(tmp_path)
    (bad.path / "run.json").write_text("")
    assert [run.path for run in list_runs(tmp_path)] == [good.path]
    assert str(bad.path) in caplog.text
    assert list_runs(tmp_path / "nowhere") == []


def test_versions_are_those_of_installed_packages() -> None:
    assert set(package_versions()) >= {"python", "torch", "ray", "numpy"}
    assert "torchaudio" not in package_versions()


# --- the lock


def test_two_processes_never_write_one_run(tmp_path: Path) -> None:
    run = create(tmp_path)
    program = (
        "import sys; from pathlib import Path; from cluster.runs.directory import RunDirectory\n"
        f"with RunDirectory(Path({str(run.path)!r})).locked():\n"
        "    print('in', flush=True); sys.stdin.read()"
    )
    root = Path(__file__).parents[3]
    holder = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"in\n"
        with (
            pytest.raises(UserError, match=rf"{run.path.name}: process {holder.pid} on .* is running this run"),
            run.locked(),
        ):
            raise AssertionError("both are inside")
    finally:
        holder.kill()
        holder.communicate()
    with run.locked():  # the dead one holds nothing
        assert f"process {os.getpid()} on" in (run.path / ".lock").read_text()


def test_the_lock_removes_what_a_kill_left_and_is_given_back(tmp_path: Path) -> None:
    run = create(tmp_path)
    (run.path / ".run.json.01234567.tmp").touch()
    for _ in range(2):
        with run.locked():
            assert list(run.path.glob(".*.tmp")) == []
            with pytest.raises(UserError, match=f"process {os.getpid()} "), run.locked():
                raise AssertionError("both are inside")


# --- resume


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
