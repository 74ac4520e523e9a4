"""Uploads: what becomes of a file, of a hostile name, of a form that is none, and of too much."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient
from starlette.types import Message

from cluster.runs.directory import RunDirectory
from cluster.service.data.datasets import Datasets
from cluster.service.data.uploads import Upload, receive_file
from cluster.service.exceptions import TooLargeError
from cluster.service.settings import Settings
from tests.support.served import serving

LINES = b'{"prompt": "Hi", "answer": "1"}\n\n{"prompt": 5}\n{"messages": [{"role": "user", "content": "x"}]}\n'


def upload(client: TestClient, name: str, content: bytes) -> dict[str, object]:
    answer = client.post("/api/v1/datasets", files={"file": (name, content)})
    assert answer.status_code == 201, answer.text
    found: dict[str, object] = answer.json()
    return found


def test_an_upload_is_checked_kept_shown_and_deleted(client: TestClient, settings: Settings) -> None:
    made = upload(client, "prompts.jsonl", LINES)
    assert (made["format"], made["ready"], made["records"], made["problems_total"]) == ("rlhf-online", False, 2, 1)
    assert made["problems"] == [
        {"line": 3, "field": "prompt", "found": "a number: 5", "expected": "a string", "severity": "error"}
    ]
    path = Path(str(made["path"]))
    assert path.read_bytes() == LINES
    assert path.is_relative_to(settings.datasets)
    listed = client.get("/api/v1/datasets").json()
    assert [one["id"] for one in listed["datasets"]] == [made["id"]]
    assert "problems" not in listed["datasets"][0]
    assert client.delete(f"/api/v1/datasets/{made['id']}").status_code == 204
    assert not path.exists()
    assert client.get(f"/api/v1/datasets/{made['id']}").status_code == 404
    assert list(settings.datasets.iterdir()) == []


def test_rows_are_chats_with_their_columns(client: TestClient) -> None:
    made = upload(client, "prompts.jsonl", LINES)
    rows = client.get(f"/api/v1/datasets/{made['id']}?rows=10").json()["rows"]
    assert rows[0] == {
        "line": 1,
        "messages": [{"role": "user", "content": "Hi"}],
        "columns": {"answer": "1"},
        "problem": None,
    }
    assert (rows[1]["line"], rows[1]["messages"]) == (3, None)
    assert "expected a string" in rows[1]["problem"]
    assert rows[2]["messages"] == [{"role": "user", "content": "x"}]
    later = client.get(f"/api/v1/datasets/{made['id']}?rows=1&offset=2").json()["rows"]
    assert [row["line"] for row in later] == [4]


@pytest.mark.parametrize("kind", ["gz", "parquet"])
def test_other_formats(client: TestClient, tmp_path: Path, kind: str) -> None:
    if kind == "gz":
        made = upload(client, "P.JSONL.GZ", gzip.compress(b'{"prompt": "a"}\n{"prompt": "b"}\n'))
    else:
        pq.write_table(pa.table({"prompt": ["a", "b"], "answer": [1, 2]}), tmp_path / "p.parquet")
        made = upload(client, "p.parquet", (tmp_path / "p.parquet").read_bytes())
    assert (made["ready"], made["records"]) == (True, 2)
    rows = client.get(f"/api/v1/datasets/{made['id']}?rows=5&offset=1").json()["rows"]
    assert [row["messages"][0]["content"] for row in rows] == ["b"]


@pytest.mark.parametrize(
    "name",
    [
        "../../../evil.jsonl",
        "/etc/cron.d/x.jsonl",
        "a\\..\\b.jsonl",
        "x" * 3000 + ".jsonl",
        "ünï\u202e.jsonl",
        ".jsonl",
    ],
)
def test_a_name_never_becomes_a_path(client: TestClient, settings: Settings, tmp_path: Path, name: str) -> None:
    before = {path for path in tmp_path.rglob("*") if settings.datasets not in path.parents}
    answer = client.post("/api/v1/datasets", files={"file": (name, b'{"prompt": "a"}\n')})
    after = {path for path in tmp_path.rglob("*") if settings.datasets not in path.parents}
    assert {path for path in after - before if path != settings.datasets and path != settings.private} == set()
    made = answer.json()
    assert len(made["name"]) <= 255
    assert Path(made["path"]).name == "prompts.jsonl"
    assert "/" not in made["name"]
    assert "\\" not in made["name"]


@pytest.mark.parametrize("name", ["prompts.csv", "prompts.py", "prompts", "jsonl"])
def test_other_suffixes_are_refused(client: TestClient, settings: Settings, name: str) -> None:
    answer = client.post("/api/v1/datasets", files={"file": (name, b"x")})
    assert answer.status_code == 415
    assert list(settings.datasets.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "kind", "expected"),
    [
        (b'{"prompt": "a"}', "application/json", 415),
        (b"", "multipart/form-data", 415),
        (b"", "multipart/form-data; boundary=b", 400),
        (b"no form at all", "multipart/form-data; boundary=b", 400),
        (
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{"pro',
            "multipart/form-data; boundary=b",
            400,
        ),
        (
            b'--b\r\nContent-Disposition: form-data; name="other"\r\n\r\nx\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            400,
        ),
        (b"--b\r\n" + b"X: y\r\n" * 100 + b"\r\n\r\n--b--\r\n", "multipart/form-data; boundary=b", 400),
    ],
)
def test_what_is_no_form(client: TestClient, settings: Settings, content: bytes, kind: str, expected: int) -> None:
    answer = client.post("/api/v1/datasets", content=content, headers={"Content-Type": kind})
    assert answer.status_code == expected
    assert set(answer.json()["error"]) == {"code", "message", "details"}
    assert list(settings.datasets.iterdir()) == []


def test_two_files_at_once_are_refused(client: TestClient) -> None:
    files = [("file", ("a.jsonl", b"{}")), ("file", ("b.jsonl", b"{}"))]
    assert client.post("/api/v1/datasets", files=files).status_code == 400


def test_more_than_the_limit_is_refused(settings: Settings) -> None:
    with serving(replace(settings, max_upload_bytes=1000)) as client:
        fits = client.post("/api/v1/datasets", files={"file": ("a.jsonl", b'{"prompt": "a"}'.ljust(1000))})
        announced = client.post("/api/v1/datasets", files={"file": ("a.jsonl", b" " * 2_000_000)})
        streamed = client.post(
            "/api/v1/datasets",
            content=_form(b" " * 65536 for _ in range(40)),
            headers={"Content-Type": "multipart/form-data; boundary=b"},
        )
        just_over = client.post("/api/v1/datasets", files={"file": ("a.jsonl", b" " * 1001)})
    assert fits.status_code == 201
    assert [answer.status_code for answer in (announced, streamed, just_over)] == [413, 413, 413]
    assert len(list(settings.datasets.glob("*"))) == 1


def test_all_uploads_together_are_bounded(settings: Settings) -> None:
    """Room is set aside while an upload comes, and free again when it failed or was deleted."""
    small = {"file": ("a.jsonl", b'{"prompt": "a"}'.ljust(1000))}
    with serving(replace(settings, max_upload_bytes=1500, max_uploads_bytes=4000)) as client:
        refused = client.post("/api/v1/datasets", files={"file": ("a.txt", b" " * 1000)})
        first, second, third = (client.post("/api/v1/datasets", files=small) for _ in range(3))
        unannounced = client.post(
            "/api/v1/datasets",
            content=_form(iter([b" " * 1200])),
            headers={"Content-Type": "multipart/form-data; boundary=b"},
        )
        fourth = client.post("/api/v1/datasets", files=small)
        client.delete(f"/api/v1/datasets/{first.json()['id']}")
        again = client.post("/api/v1/datasets", files=small)
    assert [a.status_code for a in (refused, first, second, third)] == [415, 201, 201, 201]
    assert [a.status_code for a in (unannounced, fourth, again)] == [413, 413, 201]
    assert fourth.json()["error"]["message"].startswith(
        "uploads take 3e-06 of the 4e-06 GB that they may, and this one"
    )


def test_a_wrong_suffix_is_refused_before_the_file_is_read(client: TestClient, settings: Settings) -> None:
    """The body never ends; only its first block, which holds the form's header, is taken."""
    taken, answers = 0, []
    block = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\n'
    blocks = itertools.chain([block], itertools.repeat(b"x" * 65536))

    async def receive() -> Message:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": next(blocks), "more_body": True}

    async def send(message: Message) -> None:
        answers.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=b")]
    path = "/api/v1/datasets"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    assert client.portal is not None
    client.portal.call(client.app, {**scope, "headers": headers}, receive, send)
    assert (taken, answers[0]["status"]) == (1, 415)
    assert b"expected a file name that ends in .jsonl.gz, .jsonl, .parquet" in answers[1]["body"]
    assert list(settings.datasets.iterdir()) == []


def test_uploads_at_the_same_time_share_the_room(tmp_path: Path) -> None:
    datasets = Datasets(tmp_path / "datasets", most=1000)
    with datasets.room_for(600, limit=700) as room:
        assert room == 700
        with pytest.raises(TooLargeError, match="uploads take"), datasets.room_for(600, limit=700):
            pass
        with datasets.room_for(None, limit=700) as rest:
            assert rest == 400
            with pytest.raises(TooLargeError, match="uploads take"), datasets.room_for(None, limit=700):
                pass
    with datasets.room_for(1000, limit=1000), pytest.raises(TooLargeError), datasets.room_for(1, limit=1000):
        pass


def test_uploads_leave_room_on_the_disk(tmp_path: Path) -> None:
    datasets = Datasets(tmp_path / "datasets", most=1 << 62)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(TooLargeError, match="nearly full"), datasets.room_for(free, limit=2 * free):
        pass


async def test_an_upload_takes_constant_memory(tmp_path: Path) -> None:
    """256 MB in blocks as they come from a socket, with less than 4 MiB held."""
    block, count = b"p" * 65536, 4096

    async def chunks() -> AsyncIterator[bytes]:
        for chunk in _form(block for _ in range(count)):
            yield chunk

    upload = Upload("multipart/form-data; boundary=b", None, chunks())
    tracemalloc.start()
    name, size = await receive_file(upload, tmp_path / "upload", limit=1 << 30, check_name=str)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (name, size) == ("a.jsonl", len(block) * count)
    assert (tmp_path / "upload").stat().st_size == size
    assert peak < 4 << 20


def _form(blocks: Iterator[bytes]) -> Iterator[bytes]:
    yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    yield from blocks
    yield b"\r\n--b--\r\n"


def test_a_dataset_that_a_run_needs_stays(client: TestClient, make_run: Callable[..., RunDirectory]) -> None:
    made = upload(client, "a.jsonl", b'{"prompt": "a"}\n')
    run = make_run(data={"prompts": made["path"]})
    answer = client.delete(f"/api/v1/datasets/{made['id']}")
    assert answer.status_code == 409
    assert run.path.name in answer.json()["error"]["message"]
    run.update(state="stopped")
    assert client.delete(f"/api/v1/datasets/{made['id']}").status_code == 204


def test_pages(client: TestClient, settings: Settings) -> None:
    made = upload(client, "a.jsonl", b'{"prompt": "a"}\n')
    for second in range(3):
        folder = settings.datasets / f"ds-20260101-00000{second}-abcdef"
        folder.mkdir(parents=True)
        (folder / "dataset.json").write_text(json.dumps({**made, "id": folder.name}))
    client.delete(f"/api/v1/datasets/{made['id']}")
    first = client.get("/api/v1/datasets?limit=2").json()
    second_page = client.get(f"/api/v1/datasets?limit=2&after={first['next']}").json()
    ids = [one["id"][-8:] for one in (*first["datasets"], *second_page["datasets"])]
    assert ids == ["2-abcdef", "1-abcdef", "0-abcdef"]
    assert (first["total"], second_page["next"]) == (3, None)


@pytest.mark.parametrize("dataset_id", ["%2e%2e%2f", "ds-20260101-000000-abcdef%00", "ds-x", "..%2F..%2Fetc"])
def test_ids_are_no_paths(client: TestClient, dataset_id: str) -> None:
    for method in ("GET", "DELETE"):
        assert client.request(method, f"/api/v1/datasets/{dataset_id}").status_code in (404, 405)


def test_leftovers_of_a_service_that_was_killed_are_swept(settings: Settings) -> None:
    leftover = settings.datasets / ".ds-20260101-000000-abcdef.partial"
    leftover.mkdir(parents=True)
    with serving(settings):
        assert not leftover.exists()
