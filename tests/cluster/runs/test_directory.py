"""A run's directory: layout, record, lock."""

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

from cluster.runs.directory import (
    RunDirectory,
    RunError,
    new_run_id,
    package_versions,
)
from cluster.runs.summary import list_runs
from tests.support.small_config import RewardConfig, RunConfig, create
from trainers.errors import UserError

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
    with pytest.raises(UserError, match=r"nowhere: is not a run's directory: it has no run\.json"):
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
