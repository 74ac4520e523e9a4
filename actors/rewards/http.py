"""Rewards that a server gives: POST {"prompts", "completions", "columns"}, answered by {"rewards": [number or null]}.

It knows HTTP (httpx) and runs in the driver's process. Element i of `prompts` (a list of messages), of `completions`
and of every list in `columns` belongs to completion i.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import httpx

from actors.rewards.score import Answer, PassingError, RewardError
from trainers.types import Prompt

LONGEST_TEXT = 300


class HttpScorer:
    """A client of one server; `close` it."""

    def __init__(self, url: str, *, timeout_s: float, connections: int = 1) -> None:
        self._url = url
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        timeout = httpx.Timeout(timeout_s, pool=None)  # waiting for one's turn is not the server's fault
        self._client = httpx.AsyncClient(timeout=timeout, limits=limits, follow_redirects=False)

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> list[Answer]:
        """An answer for each completion.

        Raises:
            PassingError: refused or broken connection, time limit, status 429 or 5xx.
            RewardError: any other status, or an answer that is not the agreed one.
        """
        try:
            response = await self._client.post(self._url, content=_body(prompt, completions), headers=_HEADERS)
        except httpx.TimeoutException as error:
            raise PassingError(f"{self._url}: no answer in time ({type(error).__name__})") from error
        except httpx.TransportError as error:
            raise PassingError(f"{self._url}: {type(error).__name__}: {error}") from error
        status = response.status_code
        if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise PassingError(f"{self._url}: status {status}: {response.text[:LONGEST_TEXT]}")
        if status != HTTPStatus.OK:
            raise RewardError(f"{self._url}: status {status}: {response.text[:LONGEST_TEXT]}")
        return [self._answer(value) for value in self._rewards(response, len(completions))]

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def _rewards(self, response: httpx.Response, n: int) -> list[Any]:
        try:
            answer = response.json()
        except ValueError as error:
            raise RewardError(f"{self._url}: the answer is not JSON: {response.text[:LONGEST_TEXT]!r}") from error
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list) or len(rewards) != n:
            shown = response.text[:LONGEST_TEXT]
            raise RewardError(f'{self._url}: expected {{"rewards": [{n} numbers or null]}}, found {shown}')
        return rewards

    def _answer(self, value: Any) -> Answer:
        if isinstance(value, int | float):
            return Answer(float(value))
        found = "null" if value is None else f"{json.dumps(value)[:60]}, not a number or null"
        return Answer(None, f"{self._url} answered {found}")


_HEADERS = {"content-type": "application/json"}


def _body(prompt: Prompt, completions: Sequence[str]) -> bytes:
    n = len(completions)
    columns = {key: [value] * n for key, value in prompt.columns.items()}
    body = {"prompts": [list(prompt.messages)] * n, "completions": list(completions), "columns": columns}
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError) as error:  # a Parquet column of dates or bytes
        raise RewardError(f"{prompt.source}:{prompt.line}: its columns cannot be sent as JSON: {error}") from error
