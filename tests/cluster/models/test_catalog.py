"""Which models are found, and what their small files say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from starlette.testclient import TestClient

from cluster.models.catalog import Models, describe
from cluster.runs.directory import RunDirectory
from cluster.service.settings import Settings

CAUSAL = {
    "architectures": ["Qwen3ForCausalLM"],
    "dtype": "float32",
    "vocab_size": 257,
    "max_position_embeddings": 128,
}


def model(folder: Path, config: dict[str, Any], *, tokenizer: bool = True, weights: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if weights:
        save_file({"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float32)}, folder / "model.safetensors")
    if tokenizer:
        (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    return folder


def test_kinds_and_sizes(client: TestClient, settings: Settings) -> None:
    root = settings.model_roots[0]
    model(root / "policy", CAUSAL)
    model(root / "team" / "reward", {**CAUSAL, "architectures": ["Qwen3ForSequenceClassification"], "num_labels": 1})
    hub = root / "models--org--name" / "snapshots" / "abc"
    model(hub, {**CAUSAL, "id2label": {"0": "a"}, "architectures": ["XForSequenceClassification"]}, tokenizer=False)
    adapter = root / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/models/policy"}')
    save_file({"lora": np.zeros((2, 2), np.float32)}, adapter / "adapter_model.safetensors")
    answer = client.get("/api/v1/models").json()
    found = {one["name"]: one for one in answer["models"]}
    assert list(found) == ["adapter", "org/name", "policy", "team/reward"]
    policy = found["policy"]
    assert (policy["kind"], policy["parameters"], policy["vocabulary"], policy["context"]) == ("policy", 17, 257, 128)
    assert policy["bytes"] == (root / "policy" / "model.safetensors").stat().st_size
    assert (policy["chat_template"], policy["dtype"], policy["usable"]) == (True, "float32", True)
    assert found["team/reward"]["kind"] == "reward"
    assert (found["adapter"]["kind"], found["adapter"]["base"]) == ("adapter", "/models/policy")
    assert [found[name]["role"] for name in ("policy", "team/reward", "adapter")] == ["policy", "reward", "policy"]
    assert "is not here: /models/policy" in found["adapter"]["problem"]
    assert (found["org/name"]["usable"], found["org/name"]["problem"]) == (False, "it has no tokenizer")
    assert [one["name"] for one in client.get("/api/v1/models?kind=reward").json()["models"]] == [
        "org/name",
        "team/reward",
    ]


def test_an_adapter_is_shown_with_its_base_and_its_template(tmp_path: Path) -> None:
    base = model(tmp_path / "base", CAUSAL)
    adapter = tmp_path / "sft"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "../base"}')
    save_file({"lora": np.zeros((2, 2), np.float32)}, adapter / "adapter_model.safetensors")
    found = describe(adapter, "sft")
    assert (found.usable, found.base, found.chat_template, found.parameters) == (True, str(base), True, 4)
    assert found.role == "policy"
    judge = {"peft_type": "LORA", "base_model_name_or_path": "../base", "task_type": "SEQ_CLS"}
    (adapter / "adapter_config.json").write_text(json.dumps(judge))
    assert describe(adapter, "judge").role == "reward"


def test_a_runs_model_is_found_by_its_run(client: TestClient, make_run: Callable[..., RunDirectory]) -> None:
    run = make_run("haiku")
    model(run.model, CAUSAL)
    (found,) = client.get("/api/v1/models").json()["models"]
    assert (found["run"], found["kind"], found["path"]) == (run.path.name, "policy", str(run.model))


def test_what_cannot_be_used_says_why(tmp_path: Path) -> None:
    def problem(name: str, config: Any, **options: bool) -> str:
        found = describe(model(tmp_path / name, config, **options), name)
        assert not found.usable
        assert found.problem is not None
        return found.problem

    assert "needs code of its own" in problem("code", {**CAUSAL, "auto_map": {}})
    assert "no weights" in problem("empty", CAUSAL, weights=False)
    assert "3 labels" in problem("classes", {"architectures": ["XForSequenceClassification"], "num_labels": 3})
    assert "2 labels" in problem("default", {"architectures": ["XForSequenceClassification"]})
    assert "no architecture" in problem("nothing", {})
    assert "BertModel" in problem("bert", {"architectures": ["BertModel"]})
    assert "does not hold a JSON object" in problem("list", [])
    torn = model(tmp_path / "torn", CAUSAL)
    (torn / "model.safetensors").write_bytes(b"\xff" * 100)
    assert not describe(torn, "torn").usable
    (torn / "config.json").write_bytes(b"\xff{")
    assert not describe(torn, "torn").usable


def test_links_out_of_the_root_and_deep_folders_are_left_out(tmp_path: Path) -> None:
    outside = model(tmp_path / "outside" / "m", CAUSAL).parent
    root = (tmp_path / "root").resolve()
    inside = model(root / "a" / "m", CAUSAL)
    (root / "link").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (root / "same").symlink_to(inside)
    model(root / "1" / "2" / "3" / "4", CAUSAL)
    model(root / "1" / "2" / "3" / "five" / "5", CAUSAL)
    found, truncated = Models([root], tmp_path / "runs").find()
    assert [one.name for one in found] == ["1/2/3/4", "a/m"]
    assert not truncated


def test_a_changed_model_is_read_again(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    folder = model(root / "m", CAUSAL, weights=False)
    models = Models([root], root / "runs")
    assert not models.find()[0][0].usable
    save_file({"a": np.zeros(7, np.float32)}, folder / "model.safetensors")
    assert models.find()[0][0].parameters == 7
