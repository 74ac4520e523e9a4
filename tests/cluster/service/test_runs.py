"""Runs as the API shows them, from real run directories: states, pages, metrics, events, samples, logs, archive."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cluster.jobs.job import Job, read_job, write_job
from cluster.runs.directory import RunDirectory, RunError
from cluster.runs.recorder import Recorder, RolloutRow
from cluster.service.results.metrics import MetricsReader
from cluster.service.run_creation import changed_config
from cluster.service.settings import Settings
from tests.support.served import TREE, serving

MakeRun = Callable[..., RunDirectory]
STEPS = [{"step": i, "time": 100.0 + i, "reward/mean": i / 10, "time/step_s": 2.0} for i in range(1, 11)]

HOLD = """
import sys
from pathlib import Path
from cluster.runs.directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold() -> Any:
    """Hold a run's lock from another process, as a training run does."""
    holders = []

    def begin(run: RunDirectory) -> subprocess.Popen[str]:
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        holders.append(holder)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        return holder

    yield begin
    for holder in holders:
        holder.kill()
        holder.wait()


def test_details(client: TestClient, make_run: MakeRun) -> None:
    run = make_run("haiku", metrics=STEPS, train={"steps": 20})
    run.update(state="running", step=10)
    run.update(state="failed", error=RunError(role="learner", rank=1, phase="train", type="ValueError", message="bad"))
    shown = client.get(f"/api/v1/runs/{run.path.name}").json()
    assert shown["run"]["state"] == "failed"
    assert shown["run"]["error"]["rank"] == 1
    assert shown["run"]["by_service"] is False
    assert (shown["steps_recorded"], shown["metrics"]) == (10, STEPS[-1])
    assert (shown["step_s"], shown["remaining_s"]) == (2.0, None)
    assert shown["actions"] == ["resume", "clone", "delete"]
    assert shown["config"]["train"]["steps"] == 20
    assert shown["model"] is None


def test_remaining_time_of_a_run_that_goes(client: TestClient, make_run: MakeRun, hold: Any) -> None:
    run = make_run(metrics=STEPS, train={"steps": 20})
    run.update(state="running", step=10)
    hold(run)
    shown = client.get(f"/api/v1/runs/{run.path.name}").json()
    assert (shown["run"]["state"], shown["remaining_s"]) == ("running", 20.0)
    assert shown["actions"] == ["stop", "clone"]


def test_pause_is_offered_for_runs_of_the_service_only(client: TestClient, make_run: MakeRun, hold: Any) -> None:
    run = make_run()
    run.update(state="running")
    hold(run)
    path = f"/api/v1/runs/{run.path.name}"
    refused = client.post(f"{path}/pause")
    assert refused.status_code == 409
    assert refused.json()["error"]["message"] == (
        "the service did not start this run and cannot pause it; it can be stopped, and resumed later"
    )
    assert "pause" not in client.get(path).json()["actions"]
    write_job(run, Job(since=1.0, submission="a-job"))
    assert client.get(path).json()["actions"] == ["stop", "pause", "clone"]


def test_a_run_whose_process_is_elsewhere_is_stopped_there(client: TestClient, make_run: MakeRun) -> None:
    run = make_run()
    answer = client.post(f"/api/v1/runs/{run.path.name}/stop")
    assert answer.status_code == 409
    assert "stop it there" in answer.json()["error"]["message"]


def test_a_run_whose_process_is_gone_has_failed(client: TestClient, make_run: MakeRun, hold: Any) -> None:
    run = make_run(metrics=STEPS)
    run.update(state="running", step=10)
    holder = hold(run)
    path = f"/api/v1/runs/{run.path.name}"
    assert client.get(path).json()["run"]["state"] == "running"
    holder.kill()
    holder.wait()
    shown = client.get(path).json()["run"]
    assert (shown["state"], shown["error"]["type"]) == ("failed", "Vanished")


def test_secrets_are_shown_nowhere(client: TestClient, make_run: MakeRun) -> None:
    run = make_run(rewards=[{"type": "http", "url": "https://me:hunter2@judge/s?api_key=hunter2"}])
    log = run.logs / "driver.log"
    log.write_text("POST https://me:hunter2@judge/s failed\n")
    run.update(state="running")
    error = RunError(role="reward", phase="reward", type="X", message="https://me:hunter2@judge/s: 500")
    run.update(state="failed", error=error)
    name = run.path.name
    for path in (f"{name}", "", f"{name}/logs?file=driver.log", f"{name}/diagnosis", f"{name}/events"):
        assert "hunter2" not in client.get(f"/api/v1/runs/{path}".rstrip("/")).text, path


def test_pages_states_and_text(client: TestClient, make_run: MakeRun) -> None:
    ids = [make_run(name).path.name for name in ("alpha", "beta", "gamma", "alphabet")]
    newest = sorted(ids, reverse=True)
    make_run("done").update(state="succeeded")
    seen, after = [], None
    while True:
        query = {"limit": 2, "state": "queued", **({"after": after} if after else {})}
        page = client.get("/api/v1/runs", params=query).json()
        assert page["counts"] == {"queued": 4, "succeeded": 1}
        assert page["total"] == 4
        seen += [run["id"] for run in page["runs"]]
        if (after := page["next"]) is None:
            break
    assert seen == newest
    assert client.get("/api/v1/runs?q=ALPHA").json()["total"] == 2
    both = client.get("/api/v1/runs?state=queued&state=succeeded").json()["total"]
    assert both == 5


def test_a_broken_run_is_listed_as_such(client: TestClient, make_run: MakeRun) -> None:
    run = make_run()
    (run.path / "run.json").write_text("{")
    (shown,) = client.get("/api/v1/runs").json()["runs"]
    assert (shown["id"], shown["state"]) == (run.path.name, "unreadable")
    assert client.get(f"/api/v1/runs/{run.path.name}").json()["actions"] == ["delete"]


@pytest.mark.parametrize("run_id", ["..%2F..", ".service", "%00", "a" * 101, "x/../y", "%2e%2e"])
def test_ids_are_no_paths(client: TestClient, run_id: str) -> None:
    for path in ("", "/metrics", "/logs?file=/etc/passwd", "/model", "/samples"):
        assert client.get(f"/api/v1/runs/{run_id}{path}").status_code in (404, 422)


def test_a_link_in_the_root_is_no_run(client: TestClient, make_run: MakeRun, root: Path, tmp_path: Path) -> None:
    run = make_run()
    run.path.rename(tmp_path / "elsewhere")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    assert client.get("/api/v1/runs").json()["runs"] == []
    assert client.get("/api/v1/runs/linked").status_code == 404


def test_metrics_since_keys_points_and_columns(client: TestClient, make_run: MakeRun) -> None:
    path = f"/api/v1/runs/{make_run(metrics=STEPS).path.name}/metrics"
    assert client.get(path).json() == {"metrics": STEPS, "last": 10, "total": 10}
    assert [row["step"] for row in client.get(f"{path}?since=8").json()["metrics"]] == [9, 10]
    assert client.get(f"{path}?since=8&keys=reward/mean&format=columns").json() == {
        "step": [9, 10],
        "series": {"reward/mean": [0.9, 1.0]},
        "last": 10,
        "total": 10,
    }
    assert [row["step"] for row in client.get(f"{path}?points=4").json()["metrics"]] == [1, 2, 9, 10]
    assert client.get(f"{path}?points=1").json()["metrics"] == [STEPS[-1]]


def test_metrics_have_an_etag(client: TestClient, make_run: MakeRun) -> None:
    run = make_run(metrics=STEPS)
    path = f"/api/v1/runs/{run.path.name}/metrics"
    tag = client.get(path).headers["ETag"]
    again = client.get(path, headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 11}) + "\n")
    changed = client.get(path, headers={"If-None-Match": tag})
    assert (changed.status_code, changed.json()["last"]) == (200, 11)


def test_metrics_are_read_on_and_read_again_after_a_resume(tmp_path: Path) -> None:
    path, reader = tmp_path / "metrics.jsonl", MetricsReader()
    assert reader.read(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in reader.read(path)] == [1, 2]
    with path.open("a") as file:
        file.write('ep": 3}\n')
    assert [row["step"] for row in reader.read(path)] == [1, 2, 3]
    Recorder(tmp_path).truncate_after(1)
    assert [row["step"] for row in reader.read(path)] == [1]
    path.unlink()
    assert reader.read(path) == []


def test_damaged_metrics_are_an_error_that_says_where(client: TestClient, make_run: MakeRun) -> None:
    run = make_run(metrics=STEPS[:1])
    with run.metrics.open("a") as file:
        file.write("garbage\n")
    answer = client.get(f"/api/v1/runs/{run.path.name}/metrics")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "storage"
    assert "line 2" in answer.json()["error"]["message"]
    assert "line 2" in client.get(f"/api/v1/runs/{run.path.name}").json()["metrics_problem"]


def events(text: str) -> list[tuple[str, Any]]:
    found = []
    for block in text.replace("\r\n", "\n").strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def test_events_of_a_run_that_has_ended(client: TestClient, make_run: MakeRun) -> None:
    run = make_run(metrics=STEPS)
    run.update(state="stopped", step=10)
    found = events(client.get(f"/api/v1/runs/{run.path.name}/events?since=8").text)
    assert [name for name, _ in found] == ["run", "metrics", "metrics", "end"]
    assert [row["step"] for name, row in found if name == "metrics"] == [9, 10]
    assert found[-1] == ("end", {"state": "stopped"})
    resumed = client.get(f"/api/v1/runs/{run.path.name}/events", headers={"Last-Event-ID": "9"}).text
    assert [row["step"] for name, row in events(resumed) if name == "metrics"] == [10]
    cut = events(client.get(f"/api/v1/runs/{run.path.name}/events?since=12").text)
    assert [name for name, _ in cut] == ["run", "reset", "end"]
    assert cut[1] == ("reset", {"last": 10})


def row(step: int, sample: str, group: int, **more: Any) -> RolloutRow:
    text = more.pop("completion", "an answer")
    values: dict[str, Any] = {
        "rewards": {"judge": 0.5, "rule": None},
        "reward": 0.5,
        "valid": True,
        "advantage": None,
    }
    return RolloutRow(
        step=step,
        sample_id=sample,
        group=group,
        prompt=json.dumps([{"role": "user", "content": f"question {group}"}]),
        completion=text,
        prompt_tokens=np.array([1, 2], np.int32),
        tokens=np.array([3, 4, 5], np.int32),
        logprobs=np.array([-0.5, -1.0, -0.25], np.float32),
        policy_version=0,
        finish_reason="stop",
        **{**values, **more},
    )


@pytest.fixture
def sampled(make_run: MakeRun) -> str:
    run = make_run()
    recorder = Recorder(run.path)
    recorder.rollouts(1, [row(1, "old", 0)])
    reference = np.array([-0.75, -0.5, -0.25], np.float32)
    recorder.rollouts(
        2,
        [
            row(2, "a/0", 0, reward=0.1, completion="Blue sky", rewards={"judge": 3.0, "rule": 1.0}),
            row(2, "a/1", 0, reward=0.9, advantage=1.5, rewards={"judge": 1.0, "rule": None}, ref_logprobs=reference),
            row(2, "b/0", 1, reward=None, valid=False, rewards={"judge": 2.0, "rule": float("nan")}),
        ],
    )
    recorder.rollouts(2, [row(2, "held-out", 0)], kind="eval")
    return f"/api/v1/runs/{run.path.name}/samples"


def test_samples(client: TestClient, sampled: str) -> None:
    newest = client.get(sampled).json()
    assert (newest["step"], newest["steps"], newest["total"], newest["rewards"]) == (2, [1, 2], 3, ["judge", "rule"])
    assert newest["samples"][0] == {
        "id": "a/0",
        "group": 0,
        "prompt": [{"role": "user", "content": "question 0"}],
        "completion": "Blue sky",
        "prompt_tokens": 2,
        "tokens": 3,
        "rewards": {"judge": 3.0, "rule": 1.0},
        "reward": 0.1,
        "valid": True,
        "advantage": None,
        "policy_version": 0,
        "finish_reason": "stop",
    }
    assert newest["samples"][2]["rewards"]["rule"] is None  # not a number

    def ids(query: str) -> list[str]:
        return [sample["id"] for sample in client.get(f"{sampled}?{query}").json()["samples"]]

    assert ids("sort=reward&order=desc") == ["a/1", "a/0", "b/0"]
    assert ids("sort=reward") == ["a/0", "a/1", "b/0"]
    assert ids("sort=judge") == ["a/1", "b/0", "a/0"]
    assert ids("q=blue") == ["a/0"]
    assert ids("q=QUESTION 1") == ["b/0"]
    assert ids("group=0&limit=1&offset=1") == ["a/1"]
    assert ids("step=1") == ["old"]
    assert ids("kind=eval") == ["held-out"]
    assert client.get(f"{sampled}?step=3").status_code == 404
    assert client.get(f"{sampled}?sort=none").status_code == 422


def test_a_run_without_samples(client: TestClient, make_run: MakeRun) -> None:
    found = client.get(f"/api/v1/runs/{make_run().path.name}/samples").json()
    assert (found["step"], found["total"], found["samples"]) == (None, 0, [])


def test_tokens_of_a_sample(client: TestClient, sampled: str) -> None:
    found = client.get(f"{sampled}/tokens", params={"step": 2, "sample": "a/0"}).json()
    assert found == {"pieces": None, "tokens": [3, 4, 5], "logprobs": [-0.5, -1.0, -0.25], "kl": None}
    other = client.get(f"{sampled}/tokens", params={"step": 2, "sample": "a/1"}).json()
    assert other["kl"] == [0.25, -0.5, 0.0]  # logprobs − ref_logprobs
    assert client.get(f"{sampled}/tokens", params={"step": 2, "sample": "none"}).status_code == 404
    assert client.get(f"{sampled}/tokens", params={"step": 9, "sample": "a/0"}).status_code == 404


def test_pieces_join_to_the_text_also_where_a_character_is_many_tokens(
    client: TestClient, make_run: MakeRun, settings: Settings
) -> None:
    """A byte-level tokenizer: an emoji is four tokens, of which the last one carries it."""
    folder = settings.model_roots[0] / "policy"
    folder.mkdir()
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = "a größ 😀!"
    ids = np.array(tokenizer.encode(text).ids, np.int32)
    run = make_run(policy={"model": str(folder)})
    row_of = row(1, "x", 0, completion=text)
    sample = replace(row_of, tokens=ids, logprobs=np.zeros(len(ids), np.float32))
    Recorder(run.path).rollouts(1, [sample])
    found = client.get(f"/api/v1/runs/{run.path.name}/samples/tokens", params={"step": 1, "sample": "x"}).json()
    assert found["pieces"] == ["a", " ", "g", "r", "", "ö", "", "ß", " ", "", "", "", "😀", "!"]


def test_logs(client: TestClient, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    (run.logs / "driver.log").write_text("".join(f"line {i}\n" for i in range(10)))
    (run.logs / "learner-0.log").write_bytes(b"\xff\n")
    (tmp_path / "secret").write_text("secret")
    (run.logs / "link.log").symlink_to(tmp_path / "secret")
    path = f"/api/v1/runs/{run.path.name}/logs"
    assert [file["name"] for file in client.get(path).json()["files"]] == ["driver.log", "learner-0.log"]
    found = client.get(f"{path}?file=driver.log&lines=2").json()
    assert (found["lines"], found["truncated"]) == (["line 8", "line 9"], True)
    assert client.get(f"{path}?file=driver.log").json()["truncated"] is False
    assert client.get(f"{path}?file=learner-0.log").json()["lines"] == ["\N{REPLACEMENT CHARACTER}"]
    for name in ("link.log", "../run.json", "/etc/passwd", "", "driver.log\0"):
        assert client.get(path, params={"file": name}).status_code == 404


def test_a_long_logs_end_is_bounded(client: TestClient, make_run: MakeRun) -> None:
    run = make_run()
    (run.logs / "driver.log").write_text(("x" * 999 + "\n") * 5000)
    found = client.get(f"/api/v1/runs/{run.path.name}/logs?file=driver.log&lines=5000").json()
    assert found["truncated"] is True
    assert len(found["lines"]) == 1048  # whole lines in a MiB
    assert set(map(len, found["lines"])) == {999}


def test_the_model_as_an_archive(client: TestClient, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    path = f"/api/v1/runs/{run.path.name}/model"
    assert client.get(path).status_code == 404
    (run.model / "deep").mkdir(parents=True)
    contents = {"config.json": b"{}", "deep/weights.bin": b"w" * 3_000_001, "empty": b"", "x" * 120: b"long name"}
    for name, content in contents.items():
        (run.model / name).write_bytes(content)
    (tmp_path / "secret").write_text("secret")
    (run.model / "link").symlink_to(tmp_path / "secret")
    answer = client.get(path)
    assert len(answer.content) == int(answer.headers["Content-Length"])
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        found = {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]
    assert found == {f"{run.path.name}/{name}": content for name, content in contents.items()}


def test_a_ticket_downloads_once(settings: Settings, make_run: MakeRun) -> None:
    from cluster.service.security import sha256

    run = make_run()
    run.model.mkdir()
    (run.model / "config.json").write_text("{}")
    with serving(replace(settings, token_sha256=sha256("t" * 32))) as client:
        bearer = {"Authorization": f"Bearer {'t' * 32}"}
        url = client.post(f"/api/v1/runs/{run.path.name}/model/ticket", headers=bearer).json()["url"]
        assert client.get(url).status_code == 200
        assert client.get(url).status_code == 401


def test_delete_asks_twice_and_not_while_it_waits(client: TestClient, make_run: MakeRun, root: Path) -> None:
    run = make_run()
    write_job(run, Job(since=1.0))
    path = f"/api/v1/runs/{run.path.name}"
    assert client.delete(path).status_code == 422
    assert client.delete(f"{path}?confirm={run.path.name}").status_code == 409
    run.update(state="stopped")
    assert client.delete(f"{path}?confirm={run.path.name}").status_code == 204
    assert client.get(path).status_code == 404
    assert [entry.name for entry in root.iterdir() if entry.name != ".service"] == []


def test_a_command_that_died_before_its_run_began_leaves_what_can_be_deleted(
    client: TestClient, make_run: MakeRun, hold: Any
) -> None:
    run = make_run()
    path = f"/api/v1/runs/{run.path.name}"
    holder = hold(run)
    assert "delete" not in client.get(path).json()["actions"]
    holder.kill()
    holder.wait()
    assert client.delete(f"{path}?confirm={run.path.name}").status_code == 204


def test_what_the_state_forbids(client: TestClient, make_run: MakeRun) -> None:
    run = make_run()
    run.update(state="succeeded")
    for action in ("stop", "pause", "resume"):
        answer = client.post(f"/api/v1/runs/{run.path.name}/{action}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")


def test_a_waiting_run_is_stopped_at_once_and_resumed(client: TestClient, make_run: MakeRun) -> None:
    run = make_run()
    run.update(state="stopped")
    path = f"/api/v1/runs/{run.path.name}"
    assert client.post(f"{path}/resume").json()["run"]["state"] == "queued"
    assert client.get("/api/v1/cluster").json()["queue"][0]["id"] == run.path.name
    assert client.post(f"{path}/pause").json()["run"]["state"] == "paused"
    assert client.get("/api/v1/cluster").json()["queue"] == []
    job = read_job(run)
    assert job is not None
    assert (job.asked, job.submission) == (None, None)


def test_the_queue_is_there_again_after_a_restart(settings: Settings, make_run: MakeRun) -> None:
    first, second = make_run("first"), make_run("second")
    write_job(first, Job(since=2.0))
    write_job(second, Job(since=1.0))
    with serving(settings) as client:
        client.post("/api/v1/runs/none/stop")  # lets the queue's loop run
        queue = client.get("/api/v1/cluster").json()["queue"]
    assert [(entry["id"], entry["position"]) for entry in queue] == [(second.path.name, 1), (first.path.name, 2)]


def test_a_clone_may_not_leave_what_its_run_was_allowed(client: TestClient, make_run: MakeRun) -> None:
    run = make_run()
    path = f"/api/v1/runs/{run.path.name}/clone"
    for changes, where in (
        ({"data.prompts": "/etc/passwd"}, "data.prompts"),
        ({"policy.model": "/etc"}, "policy.model"),
        ({"root": "/elsewhere"}, "root"),
        ({"train.stepz": 1}, "train.stepz"),
        ({"train.steps": 0}, "train.steps"),
        ({"seed.x": 1}, "seed.x"),
    ):
        answer = client.post(path, json={"changes": changes})
        assert answer.status_code == 422, changes
        assert [detail["path"] for detail in answer.json()["error"]["details"]] == [where]


def test_hidden_credentials_are_not_taken_for_credentials(client: TestClient, make_run: MakeRun, root: Path) -> None:
    """What the API shows of a run, sent back as it is, would train with *** as the password; a clone knows its run's,
    but not which of two that look alike."""
    urls = ["https://me:hunter2@judge/s?api_key=5", "https://you:hunter3@judge/s?api_key=6"]
    run = make_run(rewards=[{"type": "http", "url": url, "name": url[8:10]} for url in urls])
    path = f"/api/v1/runs/{run.path.name}"
    shown = client.get(path).json()["config"]
    assert shown["rewards"][0]["url"] == "https://***@judge/s?api_key=***"
    runs = sorted(root.glob("*/run.json"))
    plan = client.post("/api/v1/plan", json=shown).json()
    made = client.post("/api/v1/runs", json=shown)
    cloned = client.post(f"{path}/clone", json={"changes": {"rewards": shown["rewards"]}})
    for found in (plan["problems"], made.json()["error"]["details"], cloned.json()["error"]["details"]):
        assert [one["message"] for one in found if one["path"] == "rewards.0.url"] == [
            "credentials were hidden here (***): give them again, or clone the run and change only other settings"
        ]
    assert (made.status_code, cloned.status_code) == (422, 422)
    assert sorted(root.glob("*/run.json")) == runs


@pytest.mark.integration  # imports transformers in a process: seconds
def test_a_clone_keeps_secrets_that_its_maker_cannot_see(client: TestClient, make_run: MakeRun) -> None:
    """A list can only be shortened as a whole, and whoever does that has seen *** for the others' secrets."""
    judge = "https://me:pass@judge/score"
    rewards = [{"type": "http", "url": "http://other/score"}, {"type": "http", "url": judge}]
    run = make_run(rewards=rewards)
    at = f"/api/v1/runs/{run.path.name}"
    shown = client.get(at).json()["config"]["rewards"][1]
    assert shown["url"] == "https://***@judge/score"
    body = {"changes": {"rewards": [shown]}}
    assert "pass" not in client.post(f"{at}/clone/plan", json=body).text
    app: Any = client.app
    _, tree = changed_config(app.state.parts, run.path.name, body["changes"], None)
    assert [reward["url"] for reward in tree["rewards"]] == [judge]


def test_a_bad_config_names_every_problem(client: TestClient, root: Path) -> None:
    answer = client.post("/api/v1/runs", json={**TREE, "train": {"steps": 0, "stepz": 1}})
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["code"] == "invalid_config"
    assert [detail["path"] for detail in error["details"]] == ["train.steps", "train.stepz"]
    assert list(root.glob("*/run.json")) == []


@pytest.mark.parametrize(
    "body", [b"[]", b"5", b"", b"{", b'{"a": ' * 100_000, b"\xff", b'{"policy": {"model": "\\ud800"}}']
)
def test_bodies_that_are_no_config(client: TestClient, body: bytes) -> None:
    for path in ("/api/v1/runs", "/api/v1/plan"):
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (200, 400, 422), (path, answer.text)
        assert answer.status_code != 200 or answer.json()["problems"]


def test_deep_and_wide_bodies_are_refused(client: TestClient) -> None:
    deep: Any = {}
    for _ in range(500):
        deep = {"a": deep}
    assert client.post("/api/v1/plan", json=deep).status_code == 422
    assert client.post("/api/v1/plan", json={"a": [0] * 30_000}).status_code == 422
