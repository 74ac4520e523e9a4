"""An upload's lengths: counted once, in nobody's way, and not at all for who has gone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from starlette.requests import Request

from cluster.jobs.ray_cluster import RayCluster
from cluster.service.api.disconnect import while_connected
from cluster.service.app import make_app
from cluster.service.data.lengths import Lengths
from cluster.service.exceptions import MalformedError
from cluster.service.schemas import LengthsReport
from cluster.service.settings import Settings
from tests.support.processes import descendants_running
from trainers.errors import UserError
from trainers.tiny_models import make_tokenizer


@pytest.fixture
async def lengths(tmp_path: Path) -> AsyncIterator[Lengths]:
    found = Lengths(tmp_path / "runs")
    yield found
    await found.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "1+1="}\n{"prompt": "10+10="}\n')
    return path


def request(*messages: str) -> tuple[Request, asyncio.Event]:
    """What the server hands on: these messages; the next one comes when the event is set."""
    disconnect, waiting = asyncio.Event(), list(messages)

    async def receive() -> dict[str, Any]:
        if not waiting:
            await disconnect.wait()
            return {"type": "http.disconnect"}
        return {"type": waiting.pop(0), "body": b""}

    return Request({"type": "http", "method": "GET", "path": "/", "headers": []}, receive), disconnect


def helpers() -> list[psutil.Process]:
    return [psutil.Process(id) for id in descendants_running("cluster.service.workers.main")]


@pytest.mark.integration  # imports transformers in a process: seconds
async def test_they_are_counted_once(lengths: Lengths, model: Path, prompts: Path) -> None:
    async def count(limit: int) -> LengthsReport:
        return await lengths.count(str(prompts), model=str(model), max_prompt_tokens=limit)

    first = await count(5)
    assert first.lengths is not None
    assert first.lengths.limit == 5
    prompts.unlink()  # noqa: ASYNC240 - nobody can count it again
    assert await asyncio.gather(count(5), count(5)) == [first, first]
    assert (await count(6)).lengths is None
    os.utime(model / "tokenizer.json", ns=(1, 1))  # the model was written anew
    assert (await count(5)).lengths is None


@pytest.mark.parametrize("messages", [(), ("http.request",)])
async def test_counting_ends_when_the_client_hangs_up(
    messages: tuple[str, ...], lengths: Lengths, model: Path, tmp_path: Path
) -> None:
    endless = tmp_path / "endless.jsonl"
    os.mkfifo(endless)  # whoever opens it waits
    asked, disconnect = request(*messages)
    counting = lengths.count(str(endless), model=str(model), max_prompt_tokens=5)
    waiting = asyncio.create_task(while_connected(asked, counting))
    while not (children := helpers()):  # noqa: ASYNC110 - a process has no event
        await asyncio.sleep(0)
    disconnect.set()
    with pytest.raises(MalformedError, match="hung up"):
        await waiting
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


async def test_what_the_work_says_is_the_answer() -> None:
    asked, _ = request()

    async def work() -> int:
        raise UserError([])

    with pytest.raises(UserError):
        await while_connected(asked, work())


async def test_an_upload_that_is_hung_up_while_it_is_read_leaves_nothing(settings: Settings) -> None:
    """The body is whole, its check goes on, and then the client is gone."""
    app = make_app(settings, RayCluster(settings.private, "http://127.0.0.1:9"))
    checker = Endless()
    app.state.parts = replace(app.state.parts, checker=checker)
    body = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="p.jsonl"\r\n\r\n{"prompt": "a"}\n\r\n--b--\r\n'
    )
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not received:
            received.append(body)
            return {"type": "http.request", "body": body, "more_body": False}
        await checker.asked.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    received: list[bytes] = []
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"multipart/form-data; boundary=b")]
    scope = {"type": "http", "method": "POST", "path": "/api/v1/datasets", "headers": headers, "query_string": b""}
    await app(scope | {"scheme": "http", "client": ("127.0.0.1", 1), "http_version": "1.1"}, receive, send)
    assert checker.ended
    assert sent[0]["status"] == 400
    assert list(settings.datasets.iterdir()) == []


class Endless:
    """A checker that never comes to an end by itself."""

    def __init__(self) -> None:
        self.asked, self.ended = asyncio.Event(), False

    async def call(self, *_: Any, **__: Any) -> None:
        self.asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended = True
