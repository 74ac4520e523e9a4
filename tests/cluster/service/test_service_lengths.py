"""An upload's lengths: counted once, in nobody's way, and not at all for who has gone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from starlette.requests import Request

from cluster.service.errors import ApiError
from cluster.service.hung_up import while_connected
from cluster.service.lengths import Lengths
from trainers.errors import UserError
from trainers.tiny_models import make_tokenizer


@pytest.fixture
async def lengths() -> AsyncIterator[Lengths]:
    found = Lengths()
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
    hung_up, waiting = asyncio.Event(), list(messages)

    async def receive() -> dict[str, Any]:
        if not waiting:
            await hung_up.wait()
            return {"type": "http.disconnect"}
        return {"type": waiting.pop(0), "body": b""}

    return Request({"type": "http", "method": "GET", "path": "/", "headers": []}, receive), hung_up


async def test_they_are_counted_once(lengths: Lengths, model: Path, prompts: Path) -> None:
    async def count(limit: int) -> dict[str, Any]:
        return await lengths.count(str(prompts), model=str(model), max_prompt_tokens=limit)

    first = await count(5)
    assert first["lengths"]["limit"] == 5
    prompts.unlink()  # noqa: ASYNC240 - nobody can count it again
    assert await asyncio.gather(count(5), count(5)) == [first, first]
    assert "lengths" not in await count(6)
    os.utime(model / "tokenizer.json", ns=(1, 1))  # the model was written anew
    assert "lengths" not in await count(5)


@pytest.mark.parametrize("messages", [(), ("http.request",)])
async def test_counting_ends_when_the_client_hangs_up(
    messages: tuple[str, ...], lengths: Lengths, model: Path, tmp_path: Path
) -> None:
    endless = tmp_path / "endless.jsonl"
    os.mkfifo(endless)  # whoever opens it waits
    asked, hung_up = request(*messages)
    counting = lengths.count(str(endless), model=str(model), max_prompt_tokens=5)
    waiting = asyncio.create_task(while_connected(asked, counting))
    while not (children := [c for c in psutil.Process().children() if "cluster.service.work" in c.cmdline()]):  # noqa: ASYNC110 - a process can only be looked for
        await asyncio.sleep(0)
    hung_up.set()
    with pytest.raises(ApiError, match="hung up"):
        await waiting
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


async def test_what_the_work_says_is_the_answer() -> None:
    asked, _ = request()

    async def work() -> int:
        raise UserError([])

    with pytest.raises(UserError):
        await while_connected(asked, work())
