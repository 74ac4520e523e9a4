"""The API against its own OpenAPI, with requests made by schemathesis: no 5xx, no traceback, no leak."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings

from cluster.config.run import parse_config
from cluster.jobs.ray_cluster import RayCluster
from cluster.runs.directory import RunDirectory
from cluster.runs.recorder import Recorder
from cluster.service.app import make_app
from cluster.service.settings import Settings
from tests.support.served import TREE

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SECRET = "hunter2-must-not-be-seen"
EXAMPLES = 25  # requests for each operation
RUN, DATASET = "20260101-000000-fuzz-abcdef", "ds-20260101-000000-abcdef"
ANSWERED = {  # at least once as it should: requests that get past the parameters
    f"GET /api/v1/{path}"
    for path in (
        "health",
        "runs",
        "runs/{run_id}",
        "runs/{run_id}/metrics",
        "runs/{run_id}/samples",
        "datasets/{dataset_id}",
    )
}
KNOWN = {"run_id": RUN, "dataset_id": DATASET}


def furnished(tmp_path: Path) -> Settings:
    """A root with one finished run and one dataset, so that requests get past 404; no page, no cluster."""
    root = (tmp_path / "runs").resolve()
    reward = {"type": "http", "url": f"http://me:{SECRET}@judge/s"}
    run = RunDirectory.create(root, "fuzz", parse_config({**TREE, "rewards": [reward], "root": str(root)}))
    run.path.rename(root / RUN)
    run = RunDirectory(root / RUN)
    run.update(state="succeeded")
    recorder = Recorder(run.path)
    recorder.step({"step": 1, "time": 1.0, "reward/mean": 0.5})
    recorder.rollouts(1, [])
    (run.logs / "driver.log").write_text("a line\n")
    run.model.mkdir()
    (run.model / "config.json").write_text("{}")
    made = Settings(root=root, page=tmp_path / "none")
    folder = made.datasets / DATASET
    folder.mkdir(parents=True)
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    record = {
        "id": DATASET,
        "name": "p",
        "path": str(folder / "prompts.jsonl"),
        "bytes": 1,
        "created": "x",
        "file": "p",
    }
    report = {"format": "rlhf-online", "ready": True, "records": 1, "duplicates": 0, "problems_total": 0}
    (folder / "dataset.json").write_text(json.dumps({**record, **report}))
    return made


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The service on a port of this machine, as uvicorn serves it."""
    made = furnished(tmp_path)
    app = make_app(made, RayCluster(made.private, "http://127.0.0.1:9"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert (made.root / RUN / "run.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_no_request_brings_it_down(served: str) -> None:
    """Each operation, with parameters at random and with those of the run and the dataset that there are."""
    schema = schemathesis.openapi.from_url(f"{served}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 25
    for operation in operations:
        codes = fuzz(operation)
        print(operation.label, dict(codes))
        assert sum(codes.values()) >= EXAMPLES // 2 or not operation.path_parameters
        if operation.label in ANSWERED:
            assert codes[200], operation.label
    assert httpx.get(f"{served}/api/v1/health").status_code == 200


def fuzz(operation: Any) -> Counter[int]:
    """Some requests of one operation, all of the same seed, so that a failure comes again; answers by status."""
    codes: Counter[int] = Counter()
    known = {} if operation.method.upper() == "DELETE" else KNOWN

    @given(case=operation.as_strategy())
    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=HealthCheck)
    def ask(case: Any) -> None:
        codes[check(case.call(timeout=60))] += 1
        if case.path_parameters and known:
            case.path_parameters = {name: known[name] for name in case.path_parameters}
            codes[check(case.call(timeout=60))] += 1

    ask()
    return codes


def check(answer: Any) -> int:
    """What holds for every answer; its status."""
    assert answer.status_code < 500, answer.text
    assert "Traceback" not in answer.text
    assert SECRET not in answer.text
    if answer.status_code >= 400 and answer.request.method != "HEAD":
        assert set(answer.json()) == {"error"}, answer.text
        assert set(answer.json()["error"]) == {"code", "message", "details"}
    return int(answer.status_code)
