"""Whole runs of `rlhf train` on the real stack: Ray, vLLM, Ray Serve, DeepSpeed, on tiny models of random weights."""

from __future__ import annotations

import fcntl
import getpass
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.warm_rlhf import WarmRlhf
from trainers.tiny_models import make_random_policy, make_random_reward_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

RLHF = str(Path(sys.executable).with_name("rlhf"))
MARK = "RLHF_TEST_MARK"
SHARED_MEMORY = Path("/dev/shm")
COMPILED = f"torchinductor_{getpass.getuser()}"  # torch's cache among the temporary files: compiling takes minutes
TIMED = ("time", "time/", "throughput/", "weights/sync_s")
STEPS = 6

REWARDS = '''
import time


def ascii(*, prompt, completion, **columns):
    """Share of characters that are ASCII: about half of what an untaught policy writes."""
    return sum(c.isascii() for c in completion) / max(1, len(completion))


def fails(*, prompt, completion, **columns):
    raise KeyError("no such column")


def hangs(*, prompt, completion, **columns):
    time.sleep(3600)
'''


@dataclass
class Workspace:
    """A folder with models, prompts and rewards, and a way to run configs in it."""

    path: Path
    scratch: Path  # of the runs' Ray
    temporary: Path  # of all else that the runs need for a time

    def leftovers(self) -> list[str]:
        """Ray's sessions and sockets, temporary files, and what is ours in shared memory and of no live process."""
        shared = [file.name for file in SHARED_MEMORY.glob("rlhf-*") if not is_locked(file)]
        return sorted([*os.listdir(self.scratch), *os.listdir(self.temporary), *shared])

    def config(self, name: str, **changes: object) -> Path:
        tree = {
            "name": name,
            "root": str(self.path / "runs"),
            "policy": {"model": "policy", "dtype": "float32"},
            "data": {"prompts": "prompts.jsonl", "eval_prompts": "held_out.jsonl", "max_prompt_tokens": 64},
            "rewards": [
                {"type": "function", "path": "rewards.py:ascii"},
                {"type": "model", "name": "model", "model": "reward", "weight": 0},
            ],
            "algorithm": {"type": "grpo", "kl": {"coef": 0.01, "controller": "adaptive", "target": 0.1, "horizon": 64}},
            "sampling": {"n": 4, "max_tokens": 8},
            "train": {"steps": STEPS, "prompts_per_step": 4, "learning_rate": 0.01},
            "checkpoint": {"every": 2},
            "eval": {"every": 3, "n": 2},
        } | changes
        file = self.path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree))
        return file

    def start(self, config: Path, *arguments: str) -> Process:
        mark = uuid.uuid4().hex
        output = (self.path / f"{config.stem}-{mark[:6]}.out").open("w+")
        process = subprocess.Popen(
            [RLHF, "train", str(config), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                MARK: mark,
                "RAY_TMPDIR": str(self.scratch),
                "TMPDIR": str(self.temporary),
            },
            cwd=self.path,
            start_new_session=True,
        )
        return Process(process, mark, Path(output.name))

    def run_of(self, name: str) -> Path:
        (found,) = (p.parent for p in (self.path / "runs").glob(f"*-{name}-*/run.json"))
        return found


@dataclass
class Process:
    """A running `rlhf train`."""

    process: subprocess.Popen[bytes]
    mark: str
    output: Path

    def wait(self) -> int:
        return self.process.wait(timeout=400)

    def text(self) -> str:
        return self.output.read_text()

    def until(self, done: object, what: str) -> None:
        """Wait until `done()`; a run that ends before is an error with its output."""
        deadline = time.monotonic() + 400
        while not done():  # type: ignore[operator]
            assert self.process.poll() is None, f"ended before {what}:\n{self.text()}"
            assert time.monotonic() < deadline, f"no {what} in time:\n{self.text()}"
            time.sleep(0.05)

    def left_behind(self) -> list[str]:
        """Processes that this run started (they inherit its environment) and that still live."""
        deadline = time.monotonic() + 90
        while (found := list(self._alive())) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def _alive(self) -> Iterator[str]:
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield " ".join(process.cmdline())[:200]
            except psutil.Error:
                continue


def is_locked(folder: Path) -> bool:
    """Whether a process uses this scratch folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    path = tmp_path_factory.mktemp("train")
    make_random_policy(path / "policy", tie_word_embeddings=True)
    make_random_reward_model(path / "reward")
    (path / "rewards.py").write_text(REWARDS)
    for name, first in (("prompts", 10), ("held_out", 70)):
        records = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(first, first + 12)]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as scratch:  # short: it holds Ray's sockets
        temporary = path / "temporary"
        temporary.mkdir()
        compiled = Path(tempfile.gettempdir(), COMPILED)
        compiled.mkdir(exist_ok=True)
        (temporary / COMPILED).symlink_to(compiled)
        yield Workspace(path, Path(scratch), temporary)


@pytest.fixture(scope="module")
def straight(workspace: Workspace) -> Path:
    """A run that nothing disturbed, and that leaves nothing behind."""
    before = workspace.leftovers()
    process = workspace.start(workspace.config("straight"))
    assert process.wait() == 0, process.text()
    assert process.left_behind() == []
    assert workspace.leftovers() == before
    return workspace.run_of("straight")


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def deterministic(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in metrics(run)]


def test_a_run_writes_what_the_interface_promises(straight: Path, workspace: Workspace) -> None:
    record = json.loads((straight / "run.json").read_text())
    assert (record["state"], record["step"], record["error"]) == ("succeeded", STEPS, None)
    lines = metrics(straight)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert set(lines[0]) == {"step", "time", "eval/reward_mean", "eval/ascii", "eval/model"}
    last = lines[-1]
    for key in ("reward/mean", "reward/std", "reward/ascii", "reward/model", "kl/mean", "kl/coef", "policy/loss"):
        assert key in last
    weights = load_file(workspace.path / "policy" / "model.safetensors")
    assert last["weights/sync_bytes"] == sum(w.nbytes for w in weights.values())
    assert last["rollout/samples"] == 16
    assert last["rollout/staleness_max"] == 0
    assert last["policy/version"] == STEPS
    assert last["reward/failed"] == 0
    samples = pq.read_table(straight / "rollouts" / "step-000001.parquet")
    assert samples.num_rows == 16
    assert sorted(p.name for p in (straight / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    assert any((straight / "tensorboard").iterdir())
    assert {p.name for p in (straight / "logs").iterdir()} == {"generator-0.log", "learner-0.log"}


def test_generator_and_trainer_agree_after_every_sync(straight: Path) -> None:
    for line in metrics(straight)[1:]:
        assert line["rollout/logprob_gap_max"] < 1e-4
        assert line["weights/canary_gap"] < 1e-4


def test_the_adaptive_coefficient_follows_its_formula(straight: Path) -> None:
    """SEMANTICS.md: e = clip(kl/target − 1, ±0.2), coef ← coef · (1 + e · n / horizon), 16 samples a step."""
    lines = metrics(straight)[1:]
    for before, after in itertools.pairwise(lines):
        error = min(max(before["kl/mean"] / 0.1 - 1, -0.2), 0.2)
        assert after["kl/coef"] == pytest.approx(before["kl/coef"] * (1 + error * 16 / 64), rel=1e-12)


def test_the_model_loads_and_answers_as_it_was_trained(straight: Path) -> None:
    """The saved model gives the last rollouts' successors: its log-probabilities are those of the last version."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(straight / "model")
    tokenizer = AutoTokenizer.from_pretrained(straight / "model")
    assert tokenizer.chat_template
    rows = pq.read_table(straight / "rollouts" / f"eval-{STEPS:06d}.parquet").to_pylist()
    for row in rows[:4]:
        ids = torch.tensor([row["prompt_tokens"] + row["tokens"]])
        with torch.no_grad():
            logprobs = model(ids).logits.double().log_softmax(-1)[0]
        start = len(row["prompt_tokens"])
        for i, (token, logprob) in enumerate(zip(row["tokens"], row["logprobs"], strict=True)):
            assert logprobs[start + i - 1, token].item() == pytest.approx(logprob, abs=1e-4)


def test_killed_interrupted_and_resumed_is_as_never_stopped(straight: Path, workspace: Workspace) -> None:
    """Killed after the first checkpoint, resumed, stopped by Ctrl-C, resumed: every deterministic number is that of the
    uninterrupted run.

    Its models come from a store, which no longer exists when it is resumed.
    """
    store = workspace.path / "store"
    for model in ("policy", "reward"):
        shutil.copytree(workspace.path / model, store / model)
    rewards = [
        {"type": "function", "path": "rewards.py:ascii"},
        {"type": "model", "name": "model", "model": f"file://{store}/reward", "weight": 0},
    ]
    config = workspace.config("torn", policy={"model": f"file://{store}/policy", "dtype": "float32"}, rewards=rewards)

    before = workspace.leftovers()
    first = workspace.start(config)
    first.until(lambda: list(workspace.path.glob("runs/*-torn-*/checkpoints/step-000002/manifest.json")), "checkpoint")
    first.process.kill()
    first.wait()
    assert first.left_behind() == []
    run = workspace.run_of("torn")
    shutil.rmtree(store)

    second = workspace.start(config)
    second.until(lambda: len(metrics(run)) > 4, "fourth step")
    os.killpg(second.process.pid, signal.SIGINT)  # as a terminal sends it: to all processes of the group
    code = second.wait()
    assert code in (130, 0), second.text()
    assert second.left_behind() == []
    if code == 130:
        record = json.loads((run / "run.json").read_text())
        assert record["state"] == "stopped"
        assert (run / "checkpoints" / f"step-{record['step']:06d}" / "manifest.json").exists()
        third = workspace.start(config)
        assert third.wait() == 0, third.text()
    assert workspace.leftovers() == before, "what the killed run left is removed by the next"

    assert workspace.run_of("torn") == run, "a resumed run stays in its directory"
    assert deterministic(run) == deterministic(straight)
    for file in sorted((straight / "rollouts").iterdir()):
        assert pq.read_table(run / "rollouts" / file.name) == pq.read_table(file)
    trained, again = (load_file(r / "model" / "model.safetensors") for r in (straight, run))
    assert trained.keys() == again.keys()
    assert all(torch.equal(trained[name], again[name]) for name in trained)


def test_a_termination_while_the_roles_start_stops_the_run(workspace: Workspace) -> None:
    process = workspace.start(workspace.config("early"))
    process.until(lambda: list(workspace.path.glob("runs/*-early-*/logs/learner-0.log")), "the learner's start")
    process.process.terminate()
    assert process.wait() == 130, process.text()
    record = json.loads((workspace.run_of("early") / "run.json").read_text())
    assert (record["state"], record["step"], record["error"]) == ("stopped", 0, None)
    assert process.left_behind() == []


def test_a_learning_rate_of_zero_changes_nothing(workspace: Workspace, warm_rlhf: WarmRlhf) -> None:
    """Evaluations draw with the same seeds each time, so that an unchanged policy scores the very same."""
    changes = ("train.steps=2", "train.learning_rate=0", "policy.dtype=bfloat16", "eval.every=0")
    finished = warm_rlhf("train", str(workspace.config("still")), *changes)
    assert finished.code == 0, finished.output
    run = workspace.run_of("still")
    lines = metrics(run)
    assert lines[-1]["eval/ascii"] == lines[0]["eval/ascii"]
    assert lines[-1]["eval/model"] == lines[0]["eval/model"]
    assert max(line["rollout/logprob_gap_max"] for line in lines[1:]) < 0.05
    before = load_file(workspace.path / "policy" / "model.safetensors")
    after = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(after[name], weight.bfloat16()) for name, weight in before.items())


def test_a_reward_that_fails_ends_the_run_with_its_cause(workspace: Workspace) -> None:
    rewards = [{"type": "function", "path": "rewards.py:fails"}]
    process = workspace.start(
        workspace.config("failing", rewards=rewards, data={"prompts": "prompts.jsonl", "max_prompt_tokens": 64})
    )
    assert process.wait() == 1
    error = json.loads((workspace.run_of("failing") / "run.json").read_text())["error"]
    assert error["type"] == "RewardsFailedError"
    for text in (error["message"], process.text()):
        assert "16 of 16 samples of step 1" in text
        assert "KeyError" in text
        assert "rewards.py" in text
    assert "Traceback" not in process.text()
    assert process.left_behind() == []


def test_a_reward_whose_import_raises_is_bad_input(workspace: Workspace) -> None:
    """The rest of the roles start at the same time, so that the error arrives in a group of exceptions."""
    (workspace.path / "broken.py").write_text("import no_such_module\n\n\ndef f(*, completion):\n    return 1.0\n")
    process = workspace.start(workspace.config("broken", rewards=[{"type": "function", "path": "broken.py:f"}]))
    assert process.wait() == 2, process.text()
    error = json.loads((workspace.run_of("broken") / "run.json").read_text())["error"]
    assert (error["role"], error["phase"], error["type"]) == ("driver", "start roles", "UserError")
    for text in (error["message"], process.text()):
        assert "rewards.0" in text
        assert "broken.py:1: importing it raised ModuleNotFoundError: No module named 'no_such_module'" in text
    assert "Traceback" not in process.text()
    assert process.left_behind() == []


def test_a_folder_without_room_is_refused_before_anything_starts(workspace: Workspace, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if mount.returncode != 0:
        pytest.skip("this machine does not allow a tmpfs to be mounted")
    try:
        process = workspace.start(workspace.config("cramped", root=str(small / "runs")))
        assert process.wait() == 2, process.text()
        assert "too little space" in process.text()
    finally:
        subprocess.run(["umount", str(small)], check=True)
