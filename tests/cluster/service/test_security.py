"""Who may ask, from where, and how often; what every answer carries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from cluster.service.security import LONGEST_BODY, Attempts, sha256
from cluster.service.settings import Settings, is_loopback
from cluster.service.tickets import Tickets
from tests.support.served import serving

TOKEN = "correct horse battery staple".replace(" ", "-")


@pytest.fixture
def guarded(settings: Settings) -> Iterator[TestClient]:
    with serving(replace(settings, token_sha256=sha256(TOKEN))) as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_only_the_hash_is_kept() -> None:
    assert sha256("abc") == hashlib.sha256(b"abc").digest()


def test_every_route_needs_the_token(guarded: TestClient) -> None:
    paths = guarded.get("/openapi.json").json()["paths"]
    asked = 0
    for path, item in paths.items():
        for method in item:
            if path == "/api/v1/health":
                continue
            answer = guarded.request(method, path.replace("{run_id}", "r").replace("{dataset_id}", "d"))
            assert answer.status_code == 401, (method, path)
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "unauthorized"
            asked += 1
    assert asked >= 25


def test_health_needs_none(guarded: TestClient) -> None:
    assert guarded.get("/api/v1/health").json()["token_required"] is True


def test_right_and_wrong_token(guarded: TestClient) -> None:
    assert guarded.get("/api/v1/runs", headers=bearer(TOKEN)).status_code == 200
    for wrong in (TOKEN[:-1], TOKEN + "x", "", "é"):
        assert guarded.get("/api/v1/runs", headers={"Authorization": f"Bearer {wrong}".encode()}).status_code == 401
    assert guarded.get("/api/v1/runs", headers={"Authorization": f"Basic {TOKEN}"}).status_code == 401


def test_ten_wrong_tokens_are_enough(guarded: TestClient) -> None:
    codes = [guarded.get("/api/v1/runs", headers=bearer("wrong")).status_code for _ in range(12)]
    assert codes == [401] * 10 + [429] * 2
    answer = guarded.get("/api/v1/runs", headers=bearer(TOKEN))
    assert answer.status_code == 429
    assert 1 <= int(answer.headers["Retry-After"]) <= 61


def test_attempts_are_forgotten_after_a_minute() -> None:
    now = [0.0]
    attempts = Attempts(limit=2, window_s=60, clock=lambda: now[0], most_clients=2)
    attempts.failed("a")
    now[0] = 10
    attempts.failed("a")
    assert attempts.wait_s("a") == 50
    assert attempts.wait_s("b") == 0
    now[0] = 60
    assert attempts.wait_s("a") == 0


def test_attempts_hold_a_bounded_number_of_clients() -> None:
    attempts = Attempts(limit=1, clock=lambda: 0.0, most_clients=2)
    for client in ("a", "b", "c"):
        attempts.failed(client)
    assert [attempts.wait_s(client) > 0 for client in "abc"] == [False, True, True]


def test_a_ticket_is_good_once_for_its_path_and_time() -> None:
    now = [0.0]
    tickets = Tickets(seconds=60, clock=lambda: now[0])
    assert not tickets.redeem("/m", "made-up")
    assert not tickets.redeem("/other", tickets.issue("/m"))
    good = tickets.issue("/m")
    assert tickets.redeem("/m", good)
    assert not tickets.redeem("/m", good)
    late = tickets.issue("/m")
    now[0] = 60
    assert not tickets.redeem("/m", late)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil", "[::ffff:1]"])
def test_foreign_host_names_are_refused_without_a_token(client: TestClient, host: str) -> None:
    answer = client.get("/api/v1/runs", headers={"Host": host})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "bad_host"


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]:8080"])
def test_names_of_this_machine_are_served(client: TestClient, host: str) -> None:
    assert client.get("/api/v1/runs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_other_sites_pages_change_nothing(client: TestClient, headers: dict[str, str]) -> None:
    for method, path in (("POST", "/api/v1/datasets"), ("POST", "/api/v1/runs"), ("DELETE", "/api/v1/runs/r")):
        answer = client.request(method, path, headers=headers)
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "cross_site"


def test_the_own_page_and_programs_are_let_through(client: TestClient) -> None:
    own = {"Origin": "http://127.0.0.1:8080", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/api/v1/runs/none/stop", headers=own).status_code == 404
    assert client.post("/api/v1/runs/none/stop").status_code == 404


def test_no_answer_allows_another_origin(client: TestClient) -> None:
    answer = client.options(
        "/api/v1/runs", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def test_long_bodies_are_refused_announced_or_not(client: TestClient) -> None:
    body = b'{"a": "' + b"x" * LONGEST_BODY + b'"}'
    headers = {"Content-Type": "application/json"}
    announced = client.post("/api/v1/plan", content=body, headers=headers)
    streamed = client.post("/api/v1/plan", content=iter([body[:1000], body[1000:]]), headers=headers)
    assert (announced.status_code, streamed.status_code) == (413, 413)
    assert streamed.json()["error"]["code"] == "too_large"


@pytest.mark.parametrize("path", ["/", "/docs", "/api/v1/runs", "/api/v1/none", "/openapi.json"])
def test_every_answer_carries_the_headers(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert "set-cookie" not in headers


def test_docs_load_nothing_from_elsewhere(client: TestClient) -> None:
    text = client.get("/docs").text
    assert "POST /api/v1/runs" in text
    assert "http://" not in text
    assert "https://" not in text
    assert "<script" not in text


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
