"""The service end to end on its own Ray: from an upload to a chat with the trained model, and through a restart.

Everything is real: `rlhf serve` in a process, Ray Jobs, `rlhf train` with vLLM and DeepSpeed, models of random weights.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from trainers.tiny_models import make_random_policy, make_random_reward_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(2400)]

RLHF = str(Path(sys.executable).with_name("rlhf"))
LONGEST_S = 800.0  # this machine may have other work
REWARD = '''
def ascii(*, prompt, completion, **columns):
    """Share of characters that are ASCII."""
    return sum(c.isascii() for c in completion) / max(1, len(completion))
'''


@dataclass
class Service:
    """`rlhf serve` over one folder; it may be killed and started again."""

    path: Path
    process: subprocess.Popen[str] | None = None
    client: httpx.Client | None = None

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RLHF_TOKEN")}
        with (self.path / "serve.err").open("a") as errors:
            self.process = subprocess.Popen(
                [RLHF, "serve", "--port", "0", "--root", "runs", "--models", "models", "--reward-files", "rewards"],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=self.path,
                env=environment,
            )
        assert self.process.stdout is not None
        found = re.search(r"http://\S+", self.process.stdout.readline())
        assert found, (self.path / "serve.err").read_text()
        self.client = httpx.Client(base_url=f"{found[0]}/api/v1", timeout=120)

    def kill(self) -> None:
        assert self.process is not None
        assert self.client is not None
        self.client.close()
        self.process.kill()
        self.process.communicate()

    def get(self, path: str, **parameters: Any) -> Any:
        assert self.client is not None
        answer = self.client.get(path, params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, expected: int, **content: Any) -> Any:
        assert self.client is not None
        answer = self.client.post(path, **content)
        assert answer.status_code == expected, answer.text
        return answer.json()

    def until(self, run_id: str, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The run once `done` holds of it."""
        deadline = time.monotonic() + LONGEST_S
        while True:
            run: dict[str, Any] = self.get(f"/runs/{run_id}")["run"]
            if done(run):
                return run
            assert run["state"] in ("queued", "running"), (run, self.log(run_id))
            assert time.monotonic() < deadline, (run, self.get("/cluster"), self.log(run_id))
            time.sleep(0.2)

    def log(self, run_id: str) -> str:
        file = self.path / "runs" / run_id / "logs" / "driver.log"
        return file.read_text()[-3000:] if file.exists() else "no log"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    path = tmp_path_factory.mktemp("service")
    (path / "models").mkdir()
    make_random_policy(path / "models" / "policy")
    make_random_reward_model(path / "models" / "reward")
    (path / "rewards").mkdir()
    (path / "rewards" / "rules.py").write_text(REWARD)
    found = Service(path)
    try:
        found.start()
        yield found
    finally:
        if found.process is not None:
            found.kill()
        file = path / "runs" / ".service" / "ray.json"
        if file.exists():
            end_ray(json.loads(file.read_text()))


def end_ray(started: dict[str, Any]) -> None:
    """End the Ray that the service started, and see that nothing of it stays."""
    head = psutil.Process(started["pid"])
    family = [head, *head.children(recursive=True)]
    head.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=60)
    for process in alive:
        process.kill()
    shutil.rmtree(started["temporary"], ignore_errors=True)
    assert not alive, alive


@pytest.fixture(scope="module")
def config(service: Service) -> dict[str, Any]:
    """A small run of what was uploaded and found."""
    lines = "".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(10, 30))
    dataset = service.post("/datasets", 201, files={"file": ("sums.jsonl", lines)})
    assert (dataset["format"], dataset["ready"], dataset["records"]) == ("rlhf-online", True, 20)
    models = {model["kind"]: model["path"] for model in service.get("/models")["models"]}
    (function,) = service.get("/service")["reward_functions"]
    return {
        "name": "tiny",
        "policy": {"model": models["policy"], "dtype": "float32"},
        "data": {"prompts": dataset["path"], "max_prompt_tokens": 64},
        "rewards": [
            {"type": "function", "path": function["path"]},
            {"type": "model", "name": "judge", "model": models["reward"], "weight": 0, "dtype": "float32"},
        ],
        "algorithm": {"type": "grpo"},
        "sampling": {"n": 2, "max_tokens": 6},
        "train": {"steps": 2, "prompts_per_step": 2},
        "checkpoint": {"every": 0},
        "logging": {"tensorboard": False},
    }


@pytest.fixture(scope="module")
def finished(service: Service, config: dict[str, Any]) -> str:
    """The id of a run that went from POST to its end."""
    plan = service.post("/plan", 200, json=config)
    assert (plan["problems"], plan["arithmetic"][0]) == ([], "2 prompts × 2 completions = 4 samples a step")
    key = {"Idempotency-Key": "once"}
    run = service.post("/runs", 201, json=config, headers=key)["run"]
    assert run["state"] == "queued"
    assert service.post("/runs", 200, json=config, headers=key)["run"]["id"] == run["id"]
    service.post("/runs", 409, json={**config, "seed": 1}, headers=key)
    done = service.until(run["id"], lambda run: run["state"] == "succeeded")
    assert (done["step"], done["steps"], done["by_service"], done["queue"]) == (2, 2, True, None)
    run_id: str = run["id"]
    return run_id


def test_what_a_run_leaves(service: Service, finished: str) -> None:
    shown = service.get(f"/runs/{finished}")
    assert shown["actions"] == ["clone", "delete", "chat", "download"]
    assert shown["samples"]["step"] == [1, 2]
    assert [row["step"] for row in service.get(f"/runs/{finished}/metrics")["metrics"]] == [1, 2]
    samples = service.get(f"/runs/{finished}/samples", step=2)
    assert (samples["total"], sorted(samples["rewards"])) == (4, ["ascii", "judge"])
    tokens = service.get(f"/runs/{finished}/samples/tokens", step=2, sample=samples["samples"][0]["id"])
    assert len(tokens["kl"]) == len(tokens["pieces"]) == len(tokens["logprobs"]) == samples["samples"][0]["tokens"]
    assert "step 2/2" in "\n".join(service.get(f"/runs/{finished}/logs", file="driver.log")["lines"])
    assert service.get(f"/runs/{finished}/diagnosis")["steps"] == 2
    assert finished in [model["run"] for model in service.get("/models", kind="policy")["models"]]


def test_the_archive_holds_the_model(service: Service, finished: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert service.client is not None
    content = service.client.get(f"/runs/{finished}/model").content
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(tmp_path, filter="data")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / finished)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / finished)
    assert model.generate(**tokenizer("1+1=", return_tensors="pt"), max_new_tokens=2).shape[0] == 1


def test_a_chat_with_the_model_and_its_base(service: Service, finished: str) -> None:
    assert service.client is not None
    said = [{"role": "user", "content": "1+1="}]
    body = {"trained": said, "base": said, "max_tokens": 4}
    answer = service.client.post(f"/runs/{finished}/chat", json=body).text
    events = re.findall(r"event: (\w+)\r?\ndata: (.*?)\r?\n", answer)
    assert events[-1] == ("done", "{}")
    assert [json.loads(data)["who"] for name, data in events if name == "end"] == ["trained", "base"]
    last = [{"role": "assistant", "content": "2"}]
    assert service.client.post(f"/runs/{finished}/chat", json={"trained": last}).status_code == 422


def test_a_run_outlives_the_service_waits_pauses_and_goes_on(service: Service, finished: str) -> None:
    changes = {"train.steps": 5000, "checkpoint.every": 1000}
    going = service.post(f"/runs/{finished}/clone", 201, json={"changes": changes, "name": "long"})["run"]["id"]
    again = {"json": {"name": "next"}, "headers": {"Idempotency-Key": "next"}}
    waiting = service.post(f"/runs/{finished}/clone", 201, **again)["run"]["id"]
    assert service.post(f"/runs/{finished}/clone", 200, **again)["run"]["id"] == waiting
    service.until(going, lambda run: run["step"] >= 2)
    queue = service.get("/cluster")["queue"]
    assert [(entry["id"], entry["position"]) for entry in queue] == [(waiting, 1)]
    assert going in queue[0]["reason"]
    assert service.get(f"/runs/{waiting}")["run"]["queue"]["position"] == 1

    before = service.get(f"/runs/{going}")["run"]["step"]
    service.kill()
    service.start()
    assert {run["id"] for run in service.get("/runs")["runs"]} == {finished, going, waiting}
    assert service.get(f"/runs/{going}")["run"]["state"] == "running"
    service.until(going, lambda run: run["step"] > before + 2)
    service.post(f"/runs/{waiting}/stop", 202)
    assert service.get(f"/runs/{waiting}")["run"]["state"] == "stopped"

    assert service.post(f"/runs/{going}/pause", 202)["run"]["stopping"] is True
    paused = service.until(going, lambda run: run["state"] == "paused")
    shown = service.get(f"/runs/{going}")
    assert shown["checkpoints"][-1]["step"] == paused["step"]
    assert shown["actions"] == ["resume", "clone", "delete"]

    assert service.post(f"/runs/{going}/resume", 202)["run"]["state"] == "queued"
    service.until(going, lambda run: run["step"] > paused["step"])
    steps = [row["step"] for row in service.get(f"/runs/{going}/metrics")["metrics"]]
    assert steps == list(range(1, len(steps) + 1))
    service.post(f"/runs/{going}/stop", 202)
    service.until(going, lambda run: run["state"] == "stopped")
    assert service.client is not None
    assert service.client.delete(f"/runs/{going}", params={"confirm": going}).status_code == 204


def test_a_run_of_the_command_line_is_shown_followed_and_stopped(
    service: Service, finished: str, config: dict[str, Any]
) -> None:
    """`rlhf submit` finds the Ray of the service by the root; `rlhf runs stop` stops what it started."""
    tree = {**config, "name": "cli", "root": str(service.path / "runs"), "train": {**config["train"], "steps": 5000}}
    (service.path / "cli.yaml").write_text(json.dumps(tree))  # JSON is YAML
    with (service.path / "cli.out").open("w") as output:
        command = [RLHF, "submit", "cli.yaml", "--follow"]
        submitted = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=service.path)
    try:
        deadline = time.monotonic() + LONGEST_S
        while not (found := [run["id"] for run in service.get("/runs", q="cli")["runs"]]):
            assert submitted.poll() is None, (service.path / "cli.out").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        service.until(found[0], lambda run: run["step"] >= 1)
        done = subprocess.run(
            [RLHF, "runs", "stop", found[0]], cwd=service.path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert service.until(found[0], lambda run: run["state"] == "stopped")["step"] >= 1
        assert submitted.wait(timeout=120) == 130
        assert "step 1/5000" in (service.path / "cli.out").read_text()
    finally:
        submitted.kill()
        submitted.wait()
