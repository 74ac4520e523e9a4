"""The complete reward service: on Ray Serve, with processes that die, and beside another run's."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
import ray
import torch
from pydantic import TypeAdapter
from ray import serve
from transformers import AutoModelForSequenceClassification

from actors.messages import GroupScores, ScoreRequest
from actors.rewards.config import RewardConfig
from actors.rewards.ray_serve import CONTROLLER
from actors.rewards.scorer import Scorer
from actors.runtime.actor_group import RoleError
from tests.support.tiny_reward_models import make_reward_model, make_tokenizer
from trainers.errors import UserError
from trainers.types import Completion, Prompt

SLOW_S = 2.0

RULES = """
import os, sys
def is_right(*, prompt, completion, answer, **columns):
    if completion == "raise": raise ValueError("no digits")
    if completion == "die": os.kill(os.getpid(), 11)
    if completion == "nan": return float("nan")
    if completion == "huge": return 1e200
    if completion == "pid": return os.getppid()
    return float(completion == answer)
def length(*, prompts, completions, **columns):
    return [len(c) if c else None for c in completions]
def slow(completion, **_):
    while completion == "hang": pass
    return 1.0
"""


def request_of(*completions: str) -> ScoreRequest:
    prompt = Prompt(
        messages=({"role": "user", "content": "2+2?"},), columns={"answer": "4"}, source="p.jsonl", line=7
    )  # fmt: skip
    none = np.zeros(0, dtype=np.int32)
    written = tuple(
        Completion(tokens=none, logprobs=none.astype(np.float32), text=text, finish_reason="stop", policy_version=0)
        for text in completions
    )
    return ScoreRequest(prompt=prompt, prompt_tokens=none, completions=written)


def config_of(**fields: Any) -> RewardConfig:
    return TypeAdapter(RewardConfig).validate_python(fields)


def function(name: str, **fields: Any) -> RewardConfig:
    return config_of(type="function", path=f"rules.py:{name}", **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    (folder / "rules.py").write_text(RULES)
    make_reward_model(folder / "judge")
    return folder


@asynccontextmanager
async def started(folder: Path, *configs: RewardConfig, run_id: str = "run") -> AsyncIterator[Scorer]:
    scorer = Scorer(configs, base_dir=folder, run_id=run_id)
    try:
        await scorer.start(deadline_s=120)
        yield scorer
    finally:
        await scorer.close()


def causes(scores: GroupScores) -> list[str]:
    return [failure.cause for failure in scores.failures]


def judged(folder: Path, *texts: str) -> list[float]:
    """The oracle: plain transformers, one chat at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "judge", dtype=torch.float32).eval()
    chats = [make_tokenizer()(f"<user>2+2?</s><assistant>{t}</s>", return_tensors="pt").input_ids for t in texts]
    with torch.no_grad():
        return [model(chat).logits.item() for chat in chats]


def apps(run_id: str) -> list[str]:
    """The run's applications that Ray Serve has."""
    return [name for name in serve.status().applications if name.startswith(f"rlhf-{run_id}-")]


def serve_runs() -> bool:
    return any(actor["name"] == CONTROLLER for actor in ray.util.list_named_actors(all_namespaces=True))


def serve_test(test: Any) -> Any:
    """In the event loop of the module, where the shared scorer lives."""
    return pytest.mark.integration(pytest.mark.asyncio(loop_scope="module")(test))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scorer(ray_cluster: None, folder: Path) -> AsyncIterator[Scorer]:
    """A run's rewards, which start Ray Serve for all tests here (if it does not run), and end it with themselves."""
    model = config_of(type="model", model="judge", dtype="float32", threads=1, weight=0.5, clip=(-0.4, 0.4))
    watched = function("length", weight=0), function("slow", timeout_s=SLOW_S, weight=0)
    before = serve_runs()
    async with started(folder, model, function("is_right", retries=8), *watched, run_id="shared") as scorer:
        yield scorer
    assert serve_runs() == before


def part_of(judged: float) -> float:
    """What the model's score is in the sum."""
    return 0.5 * min(max(judged, -0.4), 0.4)


@serve_test
async def test_model_and_functions_together(scorer: Scorer, folder: Path) -> None:
    scores = await scorer.score(request_of("4", "5", "raise", ""))
    judge = judged(folder, "4", "5", "raise", "")
    assert scores.rewards["judge"] == pytest.approx(judge, abs=1e-5)
    assert scores.rewards["is_right"] == (1.0, 0.0, None, 0.0)
    assert scores.rewards["length"] == (1.0, 1.0, 5.0, None)
    assert scores.reward[2] is None  # is_right failed; that length failed on the last does not count
    expected = [part_of(judge[0]) + 1, part_of(judge[1]), part_of(judge[3])]
    assert [scores.reward[i] for i in (0, 1, 3)] == pytest.approx(expected, abs=1e-5)
    assert [failure.name for failure in scores.failures] == ["is_right", "length"]
    assert causes(scores)[0].endswith("rules.py:4: is_right raised ValueError: no digits")

    many = await asyncio.gather(*(scorer.score(request_of(f"{i}", "4")) for i in range(40)))
    for i, group in enumerate(many):
        assert group.rewards["is_right"] == (float(i == 4), 1.0)
        assert group.rewards["judge"][1] == scores.rewards["judge"][0]  # to the last bit, in whatever batch


@serve_test
async def test_failures_are_never_zero(scorer: Scorer, folder: Path) -> None:
    scores = await scorer.score(request_of("4", "die", "nan", "huge", "hang"))
    assert scores.rewards["is_right"] == (1.0, None, None, None, 0.0)
    assert scores.rewards["slow"] == (1.0, 1.0, 1.0, 1.0, None)
    first, *failed, last = scores.reward
    assert failed == [None] * 3
    judge = judged(folder, "4", "hang")
    assert (first, last) == pytest.approx((part_of(judge[0]) + 1, part_of(judge[1])), abs=1e-5)
    died, nan, huge, hung = causes(scores)
    assert "the process of is_right was ended by SIGSEGV" in died
    assert nan == "the score is nan; expected a finite number within float32"
    assert "1e+200" in huge
    assert f"slow took more than {SLOW_S:g} s" in hung


@serve_test
async def test_a_replica_that_dies_is_asked_again(scorer: Scorer) -> None:
    (replica,) = (await scorer.score(request_of("pid"))).rewards["is_right"]
    assert replica is not None
    process = psutil.Process(int(replica))
    workers = process.children()
    os.kill(process.pid, signal.SIGKILL)
    scores = await scorer.score(request_of("4", "5"))
    assert scores.rewards["is_right"] == (1.0, 0.0)
    assert not scores.failures
    assert not psutil.wait_procs(workers, timeout=60)[1]


@serve_test
async def test_two_runs_share_a_cluster(scorer: Scorer, folder: Path) -> None:
    before = apps("shared")
    async with started(folder, function("is_right"), run_id="second") as second:
        assert (await second.score(request_of("4"))).reward == (1.0,)
        assert apps("second") == ["rlhf-second-is_right"]
    assert apps("second") == []
    assert apps("shared") == before  # the second took only its own away
    assert (await scorer.score(request_of("4"))).rewards["is_right"] == (1.0,)


@serve_test
async def test_all_that_cannot_be_used_is_reported_at_once(scorer: Scorer, folder: Path) -> None:
    (folder / "broken.py").write_text("import no_such_module\ndef f(completion): return 1\n")
    make_reward_model(folder / "hollow")
    (folder / "hollow" / "model.safetensors").write_bytes(b"\x08")
    wrong = Scorer(
        [function("is_right"), config_of(type="function", path="broken.py:f"), config_of(type="model", model="hollow")],
        base_dir=folder,
        run_id="wrong",
    )
    with pytest.raises(UserError) as caught:
        await wrong.start(deadline_s=120)
    assert [problem.where for problem in caught.value.problems] == ["rewards.1", "rewards.2"]
    assert "broken.py:1: importing it raised ModuleNotFoundError" in str(caught.value)
    assert "hollow: cannot be loaded as a reward model" in str(caught.value)
    assert apps("wrong") == []


@serve_test
async def test_what_is_not_ready_in_time_is_named(scorer: Scorer, folder: Path) -> None:
    model = config_of(type="model", model="judge", gpus=1)  # which this cluster does not have
    late = Scorer([model], base_dir=folder, run_id="late")
    with pytest.raises(
        RoleError, match=r"reward 0 failed in phase 'start'.*not ready within 5 s: rlhf-late-judge: DEPLOYING"
    ):
        await late.start(deadline_s=5)
    assert apps("late") == []


async def test_what_is_missing_is_reported_before_anything_starts(folder: Path) -> None:
    scorer = Scorer([function("is_rihgt"), config_of(type="model", model="./jugde")], base_dir=folder, run_id="run")
    with pytest.raises(UserError, match=r"did you mean 'is_right'\?") as caught:
        await scorer.start(deadline_s=1)
    assert [problem.where for problem in caught.value.problems] == ["rewards.0.path", "rewards.1.model"]
    await scorer.close()


class Judge(BaseHTTPRequestHandler):
    """Scores by length; fails `failures` times first."""

    failures = 0
    asked = 0
    lock = threading.Lock()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.lock:
            Judge.asked += 1
            fail = Judge.asked <= Judge.failures
        data = json.dumps({"rewards": [len(c) for c in body["completions"]]}).encode()
        self.send_response(503 if fail else 200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def judge() -> Iterator[str]:
    Judge.failures = Judge.asked = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/score"
        server.shutdown()
        thread.join()


async def test_a_server_that_fails_for_a_moment_is_asked_again(judge: str, tmp_path: Path) -> None:
    Judge.failures = 2
    async with started(tmp_path, config_of(type="http", url=judge, retries=2)) as scorer:
        scores = await scorer.score(request_of("a", "bb"))
    assert scores.rewards == {"127.0.0.1": (1.0, 2.0)}
    assert not scores.failures
    assert Judge.asked == 3


async def test_a_server_that_keeps_failing_is_left_alone(judge: str, tmp_path: Path) -> None:
    Judge.failures = 1000
    async with started(tmp_path, config_of(type="http", url=judge, retries=0, name="judge")) as scorer:
        found = [await scorer.score(request_of("a", "bb")) for _ in range(8)]
    assert Judge.asked == 5
    assert all(scores.reward == (None, None) for scores in found)
    assert "status 503" in causes(found[0])[0]
    assert causes(found[7])[0].startswith("left alone for 30 s after 5 failures in a row, the last: http")


async def test_running_statistics_change_between_steps_only(judge: str, tmp_path: Path) -> None:
    config = config_of(type="http", url=judge, name="judge", normalize=True, clip=(-1, 1))
    async with started(tmp_path, config) as scorer:
        before = await scorer.score(request_of("x", "xxx"))
        assert before.reward == (1.0, 1.0)  # nothing seen yet: as they are, clipped
        scorer.end_step([before.rewards])  # mean 2, std √2
        after = await scorer.score(request_of("xx", "xxx", "x" * 50))
        assert after.rewards["judge"] == (2.0, 3.0, 50.0)
        assert after.reward == pytest.approx((0.0, 0.5**0.5, 1.0))
        state = json.loads(json.dumps(scorer.state()))
    async with started(tmp_path, config) as resumed:
        resumed.restore(state)
        assert resumed.state() == state
        assert (await resumed.score(request_of("xx", "xxx", "x" * 50))).reward == after.reward


def test_a_state_of_other_rewards_is_refused(tmp_path: Path) -> None:
    scorer = Scorer([config_of(type="http", url="http://j", normalize=True)], base_dir=tmp_path, run_id="run")
    with pytest.raises(ValueError, match=r"statistics of the rewards \[\], but \['j'\] are normalized"):
        scorer.restore({})


async def test_a_group_without_completions(judge: str, tmp_path: Path) -> None:
    async with started(tmp_path, config_of(type="http", url=judge)) as scorer:
        assert (await scorer.score(request_of())).reward == ()
