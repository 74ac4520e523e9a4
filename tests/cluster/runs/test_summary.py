"""Listing and showing runs from real run directories, whole and broken."""

import json

import pytest

from cluster.runs.directory import RunDirectory
from cluster.runs.summary import details, find_run, list_runs
from trainers.config import Config
from trainers.errors import UserError


class _Train(Config):
    steps: int = 3


class _Run(Config):
    name: str = "demo"
    train: _Train = _Train()


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


def make(root, name="demo"):
    return RunDirectory.create(root, name, _Run(name=name))


def test_runs_are_listed_with_what_run_json_says(root):
    first, second = make(root, "one"), make(root, "two")
    second.update(state="running", step=2)
    runs = {run.id: run for run in list_runs(root)}
    assert set(runs) == {first.path.name, second.path.name}
    assert (runs[second.path.name].state, runs[second.path.name].record.step) == ("running", 2)
    assert runs[first.path.name].as_json()["state"] == "queued"


def test_a_folder_without_run_json_is_no_run(root):
    make(root)
    (root / "notes").mkdir()
    (root / "file.txt").write_text("x")
    assert len(list_runs(root)) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"state": 3}'])
def test_a_broken_run_json_is_shown_as_such(root, text):
    run = make(root)
    (run.path / "run.json").write_text(text)
    (found,) = list_runs(root)
    assert (found.state, found.id) == ("unreadable", run.path.name)
    assert "cannot be read" in found.unreadable
    assert found.as_json()["unreadable"] == found.unreadable


def test_a_half_written_last_line_is_left_out(root):
    run = make(root)
    run.metrics.write_text('{"step": 1, "reward/mean": 0.25}\n{"step": 2, "rew')
    found = details(find_run(root, run.path.name))
    assert (found.steps_recorded, found.metrics, found.metrics_problem) == (1, {"step": 1, "reward/mean": 0.25}, None)


def test_a_broken_line_in_the_middle_is_said_with_its_number(root):
    run = make(root)
    run.metrics.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    found = details(find_run(root, run.path.name))
    assert found.metrics is None
    assert "line 2" in found.metrics_problem


def test_details_name_finished_checkpoints_and_the_model(root):
    run = make(root)
    for name in ("step-000002", "step-000010"):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "manifest.json").write_text("{}")
    (run.checkpoints / "step-000011").mkdir()
    assert details(find_run(root, run.path.name)).checkpoints == [2, 10]
    assert details(find_run(root, run.path.name)).model is None
    run.model.mkdir()
    shown = details(find_run(root, run.path.name)).as_json()
    assert shown["model"] == str(run.model)
    json.dumps(shown)


def test_a_run_is_found_by_the_beginning_of_its_id(root):
    first, second = make(root, "a"), make(root, "b")
    common = min(len(first.path.name), len(second.path.name))
    assert find_run(root, second.path.name[: common - 1]).id == second.path.name
    with pytest.raises(UserError, match="matches several runs"):
        find_run(root, second.path.name[:4])
    with pytest.raises(UserError, match=f"no such run in .*{first.path.name}"):
        find_run(root, "nothing")


def test_a_missing_root_is_said(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        list_runs(tmp_path / "nowhere")
