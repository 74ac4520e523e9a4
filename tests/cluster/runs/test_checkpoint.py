"""Checkpoints: whole or absent, whatever kills the run and wherever; damage is refused, never passed over."""

import errno
import hashlib
import io
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.runs.atomic_files import RunDirectoryError
from cluster.runs.checkpoint import Checkpoint, CheckpointStore, DriverState, checkpoint_steps, verify
from trainers.errors import UserError

FILE_OPERATIONS = frozenset(
    (
        "open",
        "write",
        "close",
        "__exit__",
        "flush",
        "fsync",
        "rename",
        "replace",
        "unlink",
        "rmdir",
        "mkdir",
        "truncate",
    )
)

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))


def state(step: int, **changes: Any) -> DriverState:
    parts: dict[str, Any] = {
        "step": step,
        "policy_version": step + 1,
        "kl": {"coef": 0.05},
        "stream": {"epoch": 0, "position": 32 * step},
        "scorer": {"correct": {"mean": 0.25, "count": 8}},
    }
    return DriverState(**{**parts, **changes})


def save(store: CheckpointStore, step: int, *, shard: bytes = b"weights", **changes: Any) -> Path:
    partial = store.begin(step)
    (partial / "learner").mkdir()
    (partial / "learner" / "rank-0.pt").write_bytes(shard)
    (partial / "rank-1.pt").write_bytes(shard * 2)
    return store.commit(step, state(step, **changes)).path


def latest(store: CheckpointStore) -> Checkpoint:
    found = store.latest()
    assert found is not None
    return found


def names(store: CheckpointStore) -> set[str]:
    return {path.name for path in store.directory.iterdir()}


@pytest.fixture
def memory_disk() -> Iterator[Path]:
    """A directory in memory where the machine has one: a thousand saves do not wait for a disk there."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        yield Path(directory)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_a_checkpoint_is_what_the_interface_says(store: CheckpointStore) -> None:
    path = save(store, 10, shard=b"abc")
    assert path == store.directory / "step-000010"
    manifest = json.loads((path / "manifest.json").read_bytes())
    assert manifest["step"] == 10
    assert set(manifest["files"]) == {"learner/rank-0.pt", "rank-1.pt", "driver.json"}
    # FIPS 180-4's example
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest["files"]["learner/rank-0.pt"] == {"size": 3, "sha256": digest}
    assert names(store) == {"step-000010"}


def test_nothing_saved_is_no_checkpoint(store: CheckpointStore) -> None:
    assert store.latest() is None
    store.begin(1)
    assert store.latest() is None
    assert checkpoint_steps(store.directory) == []


def test_the_latest_is_by_number_and_old_ones_go(store: CheckpointStore) -> None:
    for step in (999_998, 999_999, 1_000_000):
        save(store, step)
    assert latest(store).step == 1_000_000
    assert names(store) == {"step-999999", "step-1000000"}
    assert checkpoint_steps(store.directory) == [999_999, 1_000_000]


def test_the_newly_committed_is_kept_beside_later_ones(store: CheckpointStore) -> None:
    for step in (1, 5, 6):
        save(store, step)
    save(store, 2)
    assert names(store) == {"step-000002", "step-000006"}


def test_a_run_that_goes_on_from_an_earlier_step_discards_the_later_ones(store: CheckpointStore) -> None:
    save(store, 5)
    save(store, 10)
    store.begin(12)
    store.discard_after(5)
    assert names(store) == {"step-000005"}


def test_the_state_comes_back_whole(store: CheckpointStore) -> None:
    generator = np.random.default_rng(7).bit_generator.state  # holds integers of 128 bits
    saved = state(3, stream={"rng": generator, "note": "naïve \u2028"}, scorer={"m": 0.1 + 0.2, "tiny": 5e-324})
    path = save(store, 3, stream=saved.stream, scorer=saved.scorer)
    assert store.load_state(path) == saved
    assert np.random.default_rng(7).bit_generator.state == store.load_state(path).stream["rng"]


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.none()))
def test_every_number_comes_back_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, part: dict[str, Any]
) -> None:
    store = CheckpointStore(tmp_path_factory.mktemp("run"), keep=1)
    restored = store.load_state(save(store, 1, scorer=part)).scorer
    assert restored == part
    assert repr(restored) == repr(part)  # the sign of zero too


@pytest.mark.parametrize("part", [{"x": math.nan}, {"x": math.inf}, {"x": (1, 2)}, {1: "x"}, {"x": np.int64(1)}])
def test_a_state_that_json_would_change_is_refused_with_the_part(part: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="stream"):
        state(1, stream=part)


def test_a_commit_tried_again_does_not_list_its_first_manifest(store: CheckpointStore) -> None:
    (store.begin(4) / "rank-0.pt").touch()
    (store.directory / ".step-000004.partial" / "manifest.json").write_text("{}")
    manifest = json.loads((store.commit(4, state(4)).path / "manifest.json").read_bytes())
    assert set(manifest["files"]) == {"driver.json", "rank-0.pt"}
    assert latest(store).step == 4


def test_a_state_of_another_step_or_without_shards_is_no_checkpoint(store: CheckpointStore) -> None:
    store.begin(4)
    with pytest.raises(RunDirectoryError, match="step 4: the driver's state is of step 3"):
        store.commit(4, state(3))
    with pytest.raises(RunDirectoryError, match="step 4: the learners wrote no shard"):
        store.commit(4, state(4))
    assert store.latest() is None


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.keep is 0"):
        CheckpointStore(tmp_path, keep=0)


# --- damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"weighty"), "is damaged: its SHA-256"),
        (lambda path: path.write_bytes(b"weight"), "has 6 bytes, the checkpoint's manifest says 7"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_a_damaged_shard_is_refused_by_name_though_an_older_checkpoint_is_whole(
    store: CheckpointStore, damage: Callable[[Path], None], message: str
) -> None:
    save(store, 1)
    path = save(store, 2)
    damage(path / "learner" / "rank-0.pt")
    with pytest.raises(
        UserError, match=rf"step-000002/learner/rank-0\.pt: {message}.*or remove .*step-000002 to resume"
    ):
        store.latest()
    assert verify(store.directory / "step-000001").step == 1


def test_every_damaged_file_is_named(store: CheckpointStore) -> None:
    path = save(store, 2)
    (path / "rank-1.pt").unlink()
    (path / "driver.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        verify(path)
    assert [Path(problem.where).name for problem in caught.value.problems] == ["driver.json", "rank-1.pt"]


def test_without_a_manifest_it_never_existed_and_that_is_logged(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 1)
    path = save(store, 2)
    (path / "manifest.json").unlink()
    assert latest(store).step == 1
    assert "step-000002 was never finished" in caplog.text
    with pytest.raises(UserError, match=r"step-000002: is not a checkpoint: it has no manifest\.json"):
        store.load_state(path)


@pytest.mark.parametrize("content", ["", "{", '{"step": 2}', '{"step": 2, "files": {"a": {"size": -1, "sha256": ""}}}'])
def test_a_manifest_that_cannot_be_read_is_refused(store: CheckpointStore, content: str) -> None:
    path = save(store, 2)
    (path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read"):
        store.latest()


def rewrite_state(path: Path, parts: dict[str, Any]) -> None:
    """Another state with a manifest that fits it: what another version of the program would have written."""
    store = CheckpointStore(path.parent / "other", keep=1)
    other = save(store, 2)
    (other / "driver.json").write_text(json.dumps(parts))
    manifest = json.loads((other / "manifest.json").read_bytes())
    (other / "manifest.json").unlink()
    content = (other / "driver.json").read_bytes()
    manifest["files"]["driver.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (other / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(path)
    other.rename(path)


@pytest.mark.parametrize("part", sorted(DriverState.model_fields))
def test_a_state_that_lacks_a_part_is_refused_by_the_parts_name(store: CheckpointStore, part: str) -> None:
    path = save(store, 2)
    parts = json.loads((path / "driver.json").read_bytes())
    del parts[part]
    rewrite_state(path, parts)
    with pytest.raises(UserError, match=rf"driver\.json: the driver's state lacks '{part}'"):
        store.load_state(path)


def test_a_part_that_this_version_does_not_know_or_another_layout_is_refused(store: CheckpointStore) -> None:
    path = save(store, 2)
    parts = json.loads((path / "driver.json").read_bytes())
    rewrite_state(path, {**parts, "schema_version": 3, "teacher": {}})
    with pytest.raises(UserError) as caught:
        store.load_state(path)
    refused = {problem.message.split(":")[0].rsplit(" ", 1)[-1] for problem in caught.value.problems}
    assert refused == {"schema_version", "teacher"}


def test_a_state_of_the_first_layout_is_read(store: CheckpointStore) -> None:
    path = save(store, 2)
    parts = json.loads((path / "driver.json").read_bytes())
    first = {**parts, "schema_version": 1, "optimizer_steps": 4, "config_digest": "of another config"}
    rewrite_state(path, first)
    assert store.load_state(path) == state(2)
    del first["kl"]
    rewrite_state(path, first)
    with pytest.raises(UserError, match="lacks 'kl'"):
        store.load_state(path)


# --- crashes


def killed_at(point: int, work: Callable[[], object]) -> bool:
    """Does `work` in a forked process, killed just before its `point`-th file operation; False: it got through."""
    child = os.fork()
    if child == 0:
        seen = 0

        def profile(_frame: Any, event: str, function: Any) -> None:
            nonlocal seen
            if event == "c_call" and function.__name__ in FILE_OPERATIONS:
                seen += isinstance(function.__self__, (io.IOBase, ModuleType))  # not a lock's __exit__
                if seen == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.setprofile(profile)
            work()
            sys.setprofile(None)
            os._exit(0)
        finally:
            os._exit(1)  # it raised
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, "the work itself failed"
    return os.WIFSIGNALED(status)


def crash_everywhere(directory: Path, prepare: Callable[[CheckpointStore], object], step: int) -> list[tuple[int, int]]:
    """(step, policy version) of the latest checkpoint after a kill at every point of saving `step`, point by point."""
    outcomes = []
    for point in range(1, 1000):
        store = CheckpointStore(directory / str(point), keep=1)
        prepare(store)
        killed = killed_at(point, lambda store=store: save(store, step, policy_version=99))
        found = latest(store)
        assert verify(found.path) == found
        outcomes.append((found.step, store.load_state(found.path).policy_version))
        save(store, step, policy_version=100)  # and the next save works
        assert store.load_state(latest(store).path).policy_version == 100
        assert names(store) == {f"step-{step:06d}"}
        shutil.rmtree(store.directory)
        if not killed:
            return outcomes
    raise AssertionError("the save never got through")


def assert_switched_once(outcomes: list[tuple[int, int]], old: tuple[int, int], new: tuple[int, int]) -> None:
    switch = outcomes.index(new)
    assert outcomes == [old] * switch + [new] * (len(outcomes) - switch)
    assert switch > 20, "few points before the switch: are the operations still seen?"


@pytest.mark.integration
def test_killed_at_any_point_the_checkpoint_before_or_the_new_one_is_there(memory_disk: Path) -> None:
    outcomes = crash_everywhere(memory_disk, lambda store: save(store, 1, policy_version=1), step=2)
    assert_switched_once(outcomes, old=(1, 1), new=(2, 99))


@pytest.mark.integration
def test_killed_while_replacing_a_checkpoint_of_the_same_step_one_of_the_two_is_there(memory_disk: Path) -> None:
    outcomes = crash_everywhere(memory_disk, lambda store: save(store, 2, policy_version=1), step=2)
    assert_switched_once(outcomes, old=(2, 1), new=(2, 99))


def test_killed_while_discarding_later_ones_the_earlier_one_is_there(memory_disk: Path) -> None:
    for point in range(1, 1000):
        store = CheckpointStore(memory_disk / str(point), keep=3)
        for step in (1, 2, 3):
            shard = save(store, step) / "rank-1.pt"
            content = shard.read_bytes()
            shard.unlink()  # written anew, it is listed on another side of the manifest
            shard.write_bytes(content)
        killed = killed_at(point, lambda store=store: store.discard_after(1))
        assert store.latest() is not None  # never a half-removed one, which would be refused
        store.discard_after(1)
        assert names(store) == {"step-000001"}
        if not killed:
            assert point > 8
            return
    raise AssertionError("the removal never got through")


def test_everything_is_durable_before_the_name_appears(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, Path]] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def watched_rename(source: Path, target: Path) -> None:
        rename(source, target)
        events.append(("rename", target))

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    final = save(store, 2)
    partial = store.directory / ".step-000002.partial"
    appears = events.index(("rename", final))
    durable = {path for kind, path in events[:appears] if kind == "fsync"}
    # driver.json and manifest.json are made durable under their temporary names, then their directory is
    assert durable >= {partial / "learner" / "rank-0.pt", partial / "rank-1.pt", partial / "learner", partial}
    assert {path.name.split(".")[1] for path in durable if path.suffix == ".tmp"} == {"driver", "manifest"}
    assert ("fsync", store.directory) in events[appears:]


# --- no space


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The operating system refuses to write beyond `size` bytes into any file (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [100, 600])  # the state, or only the manifest, does not fit
def test_no_space_at_commit_leaves_the_checkpoint_before_and_commit_can_be_tried_again(
    store: CheckpointStore, limit: int
) -> None:
    save(store, 1)
    partial = store.begin(2)
    for rank in range(10):
        (partial / f"rank-{rank}.pt").write_bytes(b"w")
    with files_no_larger_than(limit), pytest.raises(RunDirectoryError, match=r"cannot write .*step-000002") as caught:
        store.commit(2, state(2))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert latest(store).step == 1
    assert verify(store.commit(2, state(2)).path).step == 2
