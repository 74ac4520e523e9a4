"""Files that are whole or absent."""

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.runs.atomic_files import (
    RunDirectoryError,
    explained,
    free_bytes,
    remove_temporaries,
    replacing,
    sha256_file,
    write_atomic,
)


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The operating system refuses to write beyond `size` bytes into any file (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_write_atomic_writes_text_as_utf8_and_bytes_as_they_are(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "naïve\r\n")
    write_atomic(tmp_path / "b", b"\x00\xff")
    assert (tmp_path / "a").read_bytes() == b"na\xc3\xafve\r\n"
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert names(tmp_path) == {"a", "b"}


def test_what_cannot_be_written_whole_leaves_the_old_content_and_no_litter(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    write_atomic(file, "old")
    with files_no_larger_than(1000), pytest.raises(RunDirectoryError, match=r"run\.json.*larger than this process may"):
        write_atomic(file, b"x" * 5000)
    assert file.read_text() == "old"
    assert names(tmp_path) == {"run.json"}


def test_a_full_disk_is_named_with_what_to_do_and_leaves_the_old_content(small_disk: Path) -> None:
    file = small_disk / "run.json"
    write_atomic(file, "old")
    with pytest.raises(
        RunDirectoryError, match=r"cannot write .*run\.json: the disk is full; free some space"
    ) as caught:
        write_atomic(file, b"x" * 2**20)
    assert isinstance(caught.value.__cause__, OSError)
    assert file.read_text() == "old"
    assert names(small_disk) == {"run.json"}


def test_an_exception_of_the_writer_leaves_the_old_content_and_no_litter(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    write_atomic(file, "old")

    def write_half() -> None:
        with replacing(file) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert file.read_text() == "old"
    assert names(tmp_path) == {"rows"}


def test_a_file_gets_the_permissions_that_the_umask_gives(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permission denied; give this user the right"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_each_cause_is_explained(code: int, advice: str) -> None:
    with pytest.raises(RunDirectoryError, match=rf"cannot write runs/x: .*{advice}"), explained(Path("runs/x")):
        raise OSError(code, os.strerror(code))


def test_only_left_temporaries_are_removed(tmp_path: Path) -> None:
    for name in (".run.json.0123abcd.tmp", "notes.tmp", "run.json", ".lock"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    assert names(tmp_path) == {"notes.tmp", "run.json", ".lock"}


def test_sha256_of_the_published_examples(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-4, and one million times "a"
    (tmp_path / "a").write_bytes(b"a" * 1_000_000)
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "a") == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"


def test_free_bytes_of_a_directory_that_is_not_there_yet(small_disk: Path) -> None:
    assert free_bytes(small_disk / "runs" / "x") == 256 * 1024


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=3000), st.binary(max_size=3000))
def test_the_last_write_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, first: bytes, second: bytes) -> None:
    file = tmp_path_factory.mktemp("atomic") / "file"
    write_atomic(file, first)
    write_atomic(file, second)
    assert file.read_bytes() == second
