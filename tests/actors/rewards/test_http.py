"""The HTTP reward against a real server on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from actors.rewards.http import HttpScorer
from actors.rewards.score import Answer, PassingError, RewardError
from trainers.types import Prompt

PROMPT = Prompt(
    messages=({"role": "user", "content": "2+2="},), columns={"answer": "4"}, source="p.jsonl", line=7
)  # fmt: skip


class Judge(BaseHTTPRequestHandler):
    """Scores by length; the path says how it behaves."""

    protocol_version = "HTTP/1.1"
    seen: list[Any] = []  # noqa: RUF012 — one server a test
    stop = threading.Event()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen.append(body)
        behaviour = self.path.strip("/")
        if behaviour == "hang":
            self.stop.wait(30)
        if behaviour == "drop":
            self.close_connection = True
            return
        status = int(behaviour) if behaviour.isdigit() else 200
        answers = {
            "ok": json.dumps({"rewards": [len(c) or None for c in body["completions"]]}),
            "few": '{"rewards": [1]}',
            "text": "<html>",
            "other": '{"scores": [1, 2]}',
            "strings": '{"rewards": ["1", true]}',
        }
        data = answers.get(behaviour, "sorry").encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def judge() -> Iterator[str]:
    Judge.seen, Judge.stop = [], threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        Judge.stop.set()
        server.shutdown()
        thread.join()


async def ask(url: str, *completions: str, timeout_s: float = 10) -> list[Answer]:
    client = HttpScorer(url, timeout_s=timeout_s)
    try:
        return await client.score(PROMPT, completions)
    finally:
        await client.close()


async def test_what_is_sent_and_what_comes_back(judge: str) -> None:
    answers = await ask(f"{judge}/ok", "four", "")
    assert [a.value for a in answers] == [4.0, None]
    assert answers[1].cause == f"{judge}/ok answered null"
    message = [{"role": "user", "content": "2+2="}]
    assert Judge.seen == [
        {"prompts": [message, message], "completions": ["four", ""], "columns": {"answer": ["4", "4"]}}
    ]


@pytest.mark.parametrize("status", ["500", "503", "429"])
async def test_status_that_may_pass(judge: str, status: str) -> None:
    with pytest.raises(PassingError, match=f"status {status}: sorry"):
        await ask(f"{judge}/{status}", "a")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("404", "status 404"),
        ("302", "status 302"),
        ("few", r"expected \{\"rewards\": \[2 numbers or null\]\}, found"),
        ("other", "expected"),
        ("text", "the answer is not JSON: '<html>'"),
    ],
)
async def test_answers_that_will_not_get_better(judge: str, path: str, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        await ask(f"{judge}/{path}", "a", "b")
    assert not isinstance(caught.value, PassingError)


async def test_an_element_that_is_no_number(judge: str) -> None:
    answers = await ask(f"{judge}/strings", "a", "b")
    assert [a.value for a in answers] == [None, 1.0]
    assert 'answered "1", not a number' in str(answers[0].cause)


async def test_a_server_that_hangs(judge: str) -> None:
    with pytest.raises(PassingError, match="no answer in time"):
        await ask(f"{judge}/hang", "a", timeout_s=0.2)


async def test_a_connection_that_breaks(judge: str) -> None:
    with pytest.raises(PassingError, match="RemoteProtocolError"):
        await ask(f"{judge}/drop", "a")


async def test_nobody_listens() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        port = server.server_port
    with pytest.raises(PassingError, match="ConnectError"):
        await ask(f"http://127.0.0.1:{port}/", "a")


async def test_columns_that_are_no_json() -> None:
    prompt = Prompt(messages=(), columns={"when": object()}, source="p.parquet", line=3)
    client = HttpScorer("http://127.0.0.1:9/", timeout_s=1)
    with pytest.raises(RewardError, match=r"p\.parquet:3: its columns cannot be sent as JSON"):
        await client.score(prompt, ["a"])
    await client.close()
