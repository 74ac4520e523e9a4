"""Scratch folders: gone after use, and gone after its process was killed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors.runtime.scratch_folder import remove_abandoned, scratch_folder

PREFIX = "scratch-"

HOLD = """
import sys
from pathlib import Path
from actors.runtime.scratch_folder import scratch_folder
with scratch_folder("scratch-", Path(sys.argv[1])) as folder:
    (folder / "weights").write_text("w")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_it_is_gone_after_use_and_after_a_failure(tmp_path: Path) -> None:
    with scratch_folder(PREFIX, tmp_path) as folder:
        assert folder.parent == tmp_path
        (folder / "weights").write_text("w")
    assert list(tmp_path.iterdir()) == []
    try:
        with scratch_folder(PREFIX, tmp_path) as folder:
            raise OSError("vLLM cannot read it")
    except OSError:
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    folder = Path(holder.stdout.readline().strip())
    later = time.time() + 3600
    remove_abandoned(PREFIX, tmp_path, now=later)
    assert (folder / "weights").exists()  # in use
    holder.kill()
    holder.communicate()
    remove_abandoned(PREFIX, tmp_path)
    assert folder.exists()  # so new that it might not have been locked yet
    remove_abandoned(PREFIX, tmp_path, now=later)
    assert not folder.exists()


def test_nothing_else_is_touched(tmp_path: Path) -> None:
    (tmp_path / "somebody-elses").mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "somebody-elses")
    (tmp_path / f"{PREFIX}file").write_text("")
    remove_abandoned(PREFIX, tmp_path, now=time.time() + 3600)
    assert len(list(tmp_path.iterdir())) == 3


def test_without_its_home_it_is_a_temporary_folder(tmp_path: Path) -> None:
    with scratch_folder(PREFIX, tmp_path / "missing") as folder:
        assert folder.is_dir()
    assert not folder.exists()


@pytest.mark.parametrize(("needed", "inside"), [(0, True), (32 << 20, True), ((32 << 20) + 1, False)])
def test_where_its_home_lacks_room_it_is_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: int, inside: bool
) -> None:
    """A container's 64 MiB in memory, of which 32 stay free for others."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    with scratch_folder(PREFIX, tmp_path, needed=needed) as folder:
        assert folder.is_dir()
        assert (folder.parent == tmp_path) == inside
    assert not folder.exists()
