"""What is found wrong with the rewards before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from actors.rewards.checks import validate_rewards
from actors.rewards.config import RewardConfig
from trainers.errors import Problem

ONE_LABEL = {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}


def found(folder: Path, *rewards: dict[str, Any]) -> list[Problem]:
    return validate_rewards([TypeAdapter(RewardConfig).validate_python(r) for r in rewards], folder)


def model(folder: Path, config: Any, weights: str | None = "model.safetensors") -> dict[str, Any]:
    path = folder / "models" / "judge"
    path.mkdir(parents=True)
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if weights:
        (path / weights).touch()
    return {"type": "model", "model": "models/judge"}


@pytest.mark.parametrize(
    "source",
    [
        "def f(*, prompt, completion, **columns): return 1",
        "async def f(completion, answer=None): return 1",
        "def f(prompts, completions, **_): return 1",
        "from rules import f",
        "import functools\ndef g(x, completion): pass\nf = functools.partial(g, 1)",
        "try:\n    import fast\nexcept ImportError:\n    def f(completion): return 1\n",
        "if True:\n    f = lambda completion: 1\n",
        "import contextlib\n@contextlib.contextmanager\ndef f(x): yield",  # only an import can tell
    ],
)
def test_functions_that_may_be_right(tmp_path: Path, source: str) -> None:
    (tmp_path / "rules.py").write_text(source)
    assert found(tmp_path, {"type": "function", "path": "rules.py:f"}) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "no such file: {}/rules.py; did you mean 'rule.py'?"),
        ("def is_right(completion): pass", "{}/rules.py has no function 'is_rigth'; did you mean 'is_right'?"),
        ("x = 1", "{}/rules.py has no function 'is_rigth'"),
        ("def is_rigth(:", "{}/rules.py:1 is not valid Python"),
        ("\nis_rigth = 3", "{}/rules.py:2: 'is_rigth' is not a function"),
        ("def is_rigth(text): pass", "{}/rules.py:1: is_rigth must take either completion"),
        ("def is_rigth(prompt, completion, /): pass", "prompt is positional-only"),
        ("def is_rigth(*, prompts, completion): pass", "is_rigth takes prompts together with completion"),
    ],
)
def test_functions_that_are_wrong(tmp_path: Path, source: str | None, message: str) -> None:
    (tmp_path / "rule.py").touch()
    if source is not None:
        (tmp_path / "rules.py").write_text(source)
    (problem,) = found(tmp_path, {"type": "function", "path": "rules.py:is_rigth"})
    assert problem.where == "rewards.0.path"
    assert message.format(tmp_path) in problem.message


@pytest.mark.parametrize("config", [ONE_LABEL, ONE_LABEL | {"id2label": None, "num_labels": 1}])
def test_models_that_may_be_right(tmp_path: Path, config: Any) -> None:
    assert found(tmp_path, model(tmp_path, config)) == []
    assert found(tmp_path, {"type": "model", "model": "org/on-the-hub"}) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ONE_LABEL | {"id2label": {"0": "bad", "1": "good"}}, "is a classifier with 2 labels"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "2 labels"),  # transformers' default, left out
        ({"architectures": ["Qwen3ForCausalLM"]}, "(its architectures: Qwen3ForCausalLM)"),
        (ONE_LABEL | {"auto_map": {"AutoModel": "x.y"}}, "needs code of its own"),
        ("{", "config.json cannot be read"),
        ("[]", "config.json does not hold a JSON object"),
    ],
)  # fmt: skip
def test_models_that_are_wrong(tmp_path: Path, config: Any, message: str) -> None:
    (problem,) = found(tmp_path, model(tmp_path, config))
    assert problem.where == "rewards.0.model"
    assert message in problem.message


def test_weights_that_can_run_code(tmp_path: Path) -> None:
    (problem,) = found(tmp_path, model(tmp_path, ONE_LABEL, weights="pytorch_model.bin"))
    assert "has no *.safetensors" in problem.message


@pytest.mark.parametrize("name", ["models/jugde", "./models/jugde", "a/b/c", "/no/such/folder"])
def test_a_missing_folder(tmp_path: Path, name: str) -> None:
    model(tmp_path, ONE_LABEL)
    (problem,) = found(tmp_path, {"type": "model", "model": name})
    assert problem.message.startswith("no such folder: ")
    assert ("did you mean 'judge'?" in problem.message) == name.endswith("jugde")


def test_a_file_is_no_folder_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "judge").touch()
    (problem,) = found(tmp_path, {"type": "model", "model": "judge"})
    assert problem.message == f"{tmp_path}/judge is a file; give the folder of a model"


def test_a_folder_without_config(tmp_path: Path) -> None:
    (problem,) = found(tmp_path, {"type": "model", "model": str(tmp_path)})
    assert "has no config.json" in problem.message


def test_all_problems_at_once(tmp_path: Path) -> None:
    function = {"type": "function", "path": "rules.py:f"}
    problems = found(tmp_path, function, function, {"type": "model", "model": "./judge"})
    assert [p.where for p in problems] == ["rewards.1.name", "rewards.0.path", "rewards.1.path", "rewards.2.model"]
