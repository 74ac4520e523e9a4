"""`rlhf serve` as an operator starts it: what it refuses, what it keeps of a token, how it ends."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.config.run import parse_config
from cluster.runs.directory import RunDirectory
from cluster.service.serve import ServeOptions, make_settings, new_token
from tests.support.served import TREE
from trainers.errors import UserError

pytestmark = pytest.mark.integration

RLHF = str(Path(sys.executable).with_name("rlhf"))


def options(root: Path, **changes: Any) -> ServeOptions:
    return ServeOptions(**{"host": "127.0.0.1", "port": 0, "root": root, **changes})


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Start the command; RAY_ADDRESS names a cluster that is not there, so that none is started."""
    processes = []

    def begin(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [RLHF, "serve", "--root", str(tmp_path / "runs"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAY_ADDRESS": "http://127.0.0.1:9", **environment},
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    assert found, process.communicate()
    return found[0]


def test_other_addresses_need_a_token(start: Any) -> None:
    process = start("--host", "0.0.0.0", "--port", "0")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a token is needed" in said
    assert "--new-token" in said


def test_with_a_token_it_serves_them(start: Any) -> None:
    url = address(start("--host", "0.0.0.0", "--port", "0", RLHF_TOKEN="t" * 16)).replace("0.0.0.0", "127.0.0.1")
    assert httpx.get(f"{url}/api/v1/runs").status_code == 401
    answer = httpx.get(f"{url}/api/v1/runs", headers={"Authorization": f"Bearer {'t' * 16}"})
    assert (answer.status_code, answer.json()["runs"]) == (200, [])


def test_it_ends_when_asked_to_also_with_open_events(start: Any, tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "runs", "run", parse_config(TREE))
    process = start("--port", "0")
    url = address(process)
    assert "server" not in httpx.get(f"{url}/api/v1/health").headers
    with httpx.stream("GET", f"{url}/api/v1/runs/{run.path.name}/events", timeout=30) as events:
        assert next(events.iter_lines()) == "event: run"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM)


def test_a_port_in_use_is_said(start: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start("--port", str(taken.getsockname()[1]))
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "cannot listen" in said
    assert "Traceback" not in said


def test_only_a_tokens_hash_is_kept(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    assert make_settings(options(root)).token_sha256 is None
    token = new_token(root)
    file = root / ".service" / "token"
    assert file.read_text() == hashlib.sha256(token.encode()).hexdigest() + "\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert make_settings(options(root)).token_sha256 == hashlib.sha256(token.encode()).digest()
    assert new_token(root) != token
    file.write_text("abc\n")
    with pytest.raises(UserError, match="new"):
        make_settings(options(root))


@pytest.mark.parametrize("token", ["short", "x" * 15, "with space in the middle", "ümlaut-ümlaut-ümlaut"])
def test_a_weak_token_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("RLHF_TOKEN", token)
    with pytest.raises(UserError, match="RLHF_TOKEN"):
        make_settings(options(tmp_path))


def test_every_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    none = tmp_path / "none"
    with pytest.raises(UserError) as caught:
        make_settings(
            options(tmp_path, models=(str(none), "s3://b/m"), data=(str(none), "s3://b/p"), reward_files=(none,))
        )
    assert [problem.where for problem in caught.value.problems] == ["--models", "--reward-files", "--data"]


def test_models_may_lie_in_stores(tmp_path: Path) -> None:
    settings = make_settings(options(tmp_path, models=(str(tmp_path), "s3://bucket/models/")))
    assert (settings.model_roots, settings.model_stores) == ((tmp_path.resolve(),), ("s3://bucket/models",))
    with pytest.raises(UserError, match="must not hold a password") as caught:
        make_settings(options(tmp_path, models=("sftp://me:hunter2@host/models",)))
    assert "hunter2" not in str(caught.value)


def asking(url: str, *, peer: str, forwarded: str, token: str) -> int:
    """The status of one request that comes from the address `peer` and says that it is forwarded."""
    with httpx.Client(transport=httpx.HTTPTransport(local_address=peer)) as client:
        headers = {"Authorization": f"Bearer {token}", "X-Forwarded-For": forwarded}
        return client.get(f"{url}/api/v1/runs", headers=headers).status_code


def test_clients_behind_a_proxy_have_attempts_of_their_own(start: Any) -> None:
    """The proxy is 127.0.0.1; 127.0.0.2 is none, and may say what it likes."""
    right, proxy = "t" * 16, "127.0.0.1"
    url = address(start("--port", "0", "--proxy", proxy, "--proxy", "10.1.0.0/16", RLHF_TOKEN=right))
    wrong = [asking(url, peer=proxy, forwarded="203.0.113.1", token="wrong") for _ in range(11)]
    assert wrong == [401] * 10 + [429]
    assert asking(url, peer=proxy, forwarded="203.0.113.2", token=right) == 200
    assert asking(url, peer=proxy, forwarded="203.0.113.2, 203.0.113.1, 10.1.2.3", token=right) == 429
    forged = [asking(url, peer="127.0.0.2", forwarded=f"203.0.113.{10 + i}", token="wrong") for i in range(11)]
    assert forged == [401] * 10 + [429]


def test_without_the_option_nobody_is_believed(start: Any) -> None:
    right = "t" * 16
    url = address(start("--port", "0", RLHF_TOKEN=right, FORWARDED_ALLOW_IPS="*"))
    codes = [asking(url, peer="127.0.0.1", forwarded=f"203.0.113.{i}", token="wrong") for i in range(11)]
    assert codes == [401] * 10 + [429]


@pytest.mark.parametrize("proxy", ["*", "proxy.example", "10.0.0.1/8", "0.0.0.0/0", "::/0", "", "10.0.0.1,10.0.0.2"])
def test_a_proxy_is_an_address_or_a_network(tmp_path: Path, proxy: str) -> None:
    done = CliRunner().invoke(app, ["serve", "--root", str(tmp_path), "--port", "0", "--proxy", proxy])
    assert done.exit_code == 2
    assert done.stderr.startswith("--proxy: ")
