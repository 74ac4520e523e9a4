"""Folders in stores: plain addresses, names that lead nowhere else, and every refusal in words."""

from __future__ import annotations

import threading
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cluster.models.object_store import Abandoned, StoreError, address_problem, list_folder, run_with_stall_timeout
from tests.support import remote_stores


@pytest.fixture(autouse=True)
def empty_memory():
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.mark.parametrize(
    "address", ["s3://bucket/models/policy", "gs://b/m", "file:///srv/m", "abfs://box@account.host/m", "s3://bucket"]
)
def test_plain_addresses(address):
    assert address_problem(address) is None


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/../m",
        "s3://bucket/./m",
        "s3://bucket//m",
        "s3://",
        "s3://bucket/m?versionId=1",
        "s3://bucket/%2e%2e/m",
        "s3://bucket/*",
        "zip://m::s3://bucket/m.zip",
        "s3://bucket/m\\..\\n",
        "s3://bucket/m\n",
        "://m",
    ],
)
def test_addresses_of_other_things(address):
    assert address_problem(address)
    with pytest.raises(StoreError, match="the address"):
        list_folder(address)


def test_a_password_is_refused_and_not_repeated():
    problem = address_problem("sftp://me:hunter2@host/models")
    assert "must not hold a password" in problem
    assert "hunter2" not in problem


def test_a_listing_has_files_with_versions_and_folders():
    remote_stores.put("memory://m/policy", {"config.json": "{}", ".hidden": "x"})
    remote_stores.put("memory://m/policy/inner", {"x.json": "{}"})
    folder = list_folder("memory://m/policy/")
    assert (folder.name, folder.folders, folder.child("inner")) == ("policy", ("inner",), "memory://m/policy/inner")
    assert [(file.name, file.size) for file in folder.files] == [("config.json", 2)]
    before = folder.digest(folder.files)
    assert list_folder("memory://m/policy").digest(folder.files) == before
    remote_stores.put("memory://m/policy", {"config.json": "[]"})  # as long as it was
    now = list_folder("memory://m/policy")
    assert now.digest(now.files) != before


class Hostile(MemoryFileSystem):
    """A store whose listing tries to lead out of the folder."""

    protocol = "hostile"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/m"

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        names = [
            "/m/good.json",
            "/m/../../evil.json",
            "/m/..",
            "/m/a\\b.json",
            "/m/a\0b.json",
            "/etc/passwd.json",
            "/m/",
        ]
        return [{"name": name, "size": 1, "type": "file"} for name in names]


def test_names_that_lead_out_are_left_out():
    fsspec.register_implementation("hostile", Hostile, clobber=True)
    folder = list_folder("hostile://m")
    assert [file.name for file in folder.files] == ["good.json"]
    assert not folder.files[0].known  # it has no time, so that a change would not be seen


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://nowhere", "no such folder: memory://nowhere"),
        ("file:///nowhere/at/all", "no such folder: file:///nowhere/at/all"),
        ("refusing://m", "no access to refusing://m; the driver's credentials do not allow it"),
        ("nosuchstore://m", "Protocol not known: nosuchstore"),
    ],
)
def test_why_a_folder_cannot_be_listed(address, message):
    with pytest.raises(StoreError, match=message):
        list_folder(address)


def test_a_driver_that_is_not_installed_is_named():
    fsspec.register_implementation("lacking", "a_driver_that_is_not_here.Driver", clobber=True)
    with pytest.raises(StoreError, match=r"no package to read lacking://m: .*a_driver_that_is_not_here"):
        list_folder("lacking://m")


def test_work_that_does_not_move_is_given_up():
    left, went_on = threading.Event(), threading.Event()

    def work(move):
        move()
        left.wait()
        try:
            move()
        except Abandoned:
            went_on.set()
            raise

    with pytest.raises(StoreError, match=r"no answer for 0\.05 s from s3://m"):
        run_with_stall_timeout(work, what="s3://m", patience_s=0.05)
    left.set()
    assert went_on.wait(10)


def test_work_that_moves_is_waited_for_and_its_error_is_the_callers():
    assert run_with_stall_timeout(lambda move: 7, what="m", patience_s=10) == 7

    def fail(move):
        raise StoreError("no")

    with pytest.raises(StoreError, match="no"):
        run_with_stall_timeout(fail, what="m", patience_s=10)
