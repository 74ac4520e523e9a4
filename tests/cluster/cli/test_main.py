"""The command line: what it prints and its exit codes, on real files."""

import json
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.runs.directory import RunDirectory
from trainers.config import Config
from trainers.tiny_models import make_random_policy

RLHF = [sys.executable, "-c", "from cluster.cli.main import main; main()"]


def rlhf(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


class _Train(Config):
    steps: int = 3


class _Run(Config):
    name: str = "demo"
    train: _Train = _Train()


@pytest.fixture
def bad_yaml(tmp_path):
    """A config of which nothing exists."""
    path = tmp_path / "run.yaml"
    tree = {
        "policy": {"model": str(tmp_path / "nowhere")},
        "data": {"prompts": "prompts.jsonl"},
        "rewards": [{"type": "function", "path": "rule.py:score"}],
        "algorithm": {"type": "grpo"},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def test_help_names_every_command():
    text = rlhf("--help").output
    for command in ("train", "plan", "chat", "export", "demo", "data", "runs"):
        assert f"\n  {command} " in text
    for arguments in (
        ["train"],
        ["plan"],
        ["chat"],
        ["export"],
        ["demo"],
        ["data", "check"],
        ["runs", "list"],
        ["runs", "show"],
    ):
        result = rlhf(*arguments, "--help")
        assert (result.exit_code, "--help" in result.output) == (0, True)


def test_version():
    result = rlhf("--version")
    assert (result.exit_code, result.output.split()[0]) == (0, "rlhf")


@pytest.mark.parametrize("arguments", [["nonsense"], ["train"], ["runs", "show"], ["chat", "m", "--max-tokens", "0"]])
def test_wrong_usage_ends_with_2(arguments):
    assert rlhf(*arguments).exit_code == 2


@pytest.mark.parametrize("command", ["train", "plan"])
def test_every_problem_of_a_config_is_printed_without_a_traceback(bad_yaml, command):
    done = subprocess.run(
        [*RLHF, command, bad_yaml, "policy.modle=x", "sampling.n=0", "train.steps"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "train.steps: not an override; write key.path=value, for example train.steps=50\n1 problem found\n"
    )
    done = subprocess.run([*RLHF, command, bad_yaml, "policy.modle=x", "sampling.n=0"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "policy.modle: unknown key; did you mean policy.model?\n"
        "sampling.n: expected integer ≥ 1, found 0\n"
        "2 problems found\n"
    )


def test_train_refuses_what_the_plan_finds_before_anything_starts(bad_yaml, tmp_path):
    result = rlhf("train", bad_yaml, f"root={tmp_path / 'runs'}", "--resume", tmp_path / "no-run")
    assert result.exit_code == 2
    for part in ("--resume: no such folder", "policy.model: no such folder", "prompts.jsonl", "rule.py"):
        assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_plan_as_json_holds_the_problems_too(bad_yaml):
    result = rlhf("plan", bad_yaml, "--json")
    assert result.exit_code == 2
    plan = json.loads(result.stdout)
    assert "policy.model" in [problem["path"] for problem in plan["problems"]]
    assert plan["config"]["policy"]["dtype"] == "bfloat16"
    result = rlhf("plan", bad_yaml, "x=1", "--json")
    assert json.loads(result.stdout) == {"problems": [{"path": "x", "message": "unknown key; `rlhf plan` lists all"}]}
    assert result.exit_code == 2


def test_a_plan_with_problems_is_shown_whole(bad_yaml):
    result = rlhf("plan", bad_yaml)
    assert result.exit_code == 2
    assert "32 prompts × 8 completions = 256 samples a step" in result.stdout
    assert "Problems (" in result.stdout


def test_data_check_gives_its_exit_code(tmp_path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"prompt": "1+1="}\n')
    bad.write_text("nonsense\n")
    assert rlhf("data", "check", good).exit_code == 0
    result = rlhf("data", "check", good, bad, "--json")
    assert result.exit_code == 2
    assert [file["ready"] for file in json.loads(result.stdout)["files"]] == [True, False]


def test_runs(tmp_path):
    root = tmp_path / "runs"
    assert rlhf("runs", "list", "--root", root).exit_code == 2
    root.mkdir()
    assert "no runs" in rlhf("runs", "list", "--root", root).output
    run = RunDirectory.create(root, "demo", _Run())
    run.update(state="running", step=2, headline={"reward/mean": 0.5})
    (root / "broken").mkdir()
    (root / "broken" / "run.json").write_text("{")
    run.metrics.write_text('{"step": 2, "reward/mean": 0.5}\n')
    listed = json.loads(rlhf("runs", "list", "--root", root, "--json").stdout)["runs"]
    assert {r["id"]: r["state"] for r in listed} == {run.path.name: "running", "broken": "unreadable"}
    table = rlhf("runs", "list", "--root", root)
    assert table.exit_code == 0
    assert "unreadable" in table.stdout
    shown = json.loads(rlhf("runs", "show", run.path.name, "--root", root, "--json").stdout)
    assert (shown["run"]["step"], shown["metrics"]) == (2, {"step": 2, "reward/mean": 0.5})
    assert "reward/mean" in rlhf("runs", "show", run.path.name, "--root", root).stdout
    assert rlhf("runs", "show", "broken", "--root", root).exit_code == 0
    assert rlhf("runs", "show", "nothing", "--root", root).exit_code == 2


def test_chat_with_what_is_no_model_ends_with_2(tmp_path):
    result = rlhf("chat", tmp_path, "--prompt", "hi")
    assert result.exit_code == 2
    assert "no model to chat with" in result.stderr


def test_importing_the_command_line_loads_nothing_heavy():
    heavy = "{'torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'numpy', 'pydantic', 'rich'}"
    code = f"import sys, cluster.cli.main; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("mistake", "message", "unneeded"),
    [
        ("train.steps=0", "train.steps: expected integer ≥ 1, found 0", {"torch", "ray", "transformers", "numpy"}),
        pytest.param(
            "sampling.max_tokens=100000",
            "the model's context has",
            {"torch", "ray"},
            marks=pytest.mark.integration,
        ),
    ],
)
def test_a_mistake_is_refused_before_what_it_does_not_need_is_imported(tmp_path, mistake, message, unneeded):
    """The first is one that the schema sees, the second one that needs the model's files and tokenizer."""
    make_random_policy(tmp_path / "policy")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1="}\n')
    tree = {
        "root": str(tmp_path / "runs"),
        "policy": {"model": "./policy"},
        "data": {"prompts": "prompts.jsonl", "max_prompt_tokens": 64},
        "rewards": [{"type": "http", "url": "http://judge/score"}],
        "algorithm": {"type": "grpo"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    code = (
        "import sys\nfrom cluster.cli.main import main\ntry:\n    main()\nfinally:\n"
        f"    print(sorted({unneeded} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "train", str(tmp_path / "run.yaml"), mistake]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert message in done.stderr
    assert "1 problem found" in done.stderr
