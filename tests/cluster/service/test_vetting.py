"""Which paths a config from the network may name: every way out of a folder that we know of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config.run import parse_config
from cluster.service.settings import Settings
from cluster.service.vetting import model_problem, owned, redacted, short_yaml, vet
from tests.support.served import TREE
from trainers.errors import UserError


def problems(settings: Settings, *, trusted: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    good = {**TREE, "data": {"prompts": f"{settings.data_roots[0]}/p.jsonl"}}
    return [problem.where for problem in vet(parse_config({**good, **changes}), settings, trusted=trusted)]


def test_what_is_allowed(settings: Settings) -> None:
    data, models, rewards = settings.data_roots[0], settings.model_roots[0], settings.reward_roots[0]
    assert problems(settings) == []
    for prompts in (
        f"{data}/deep/er.jsonl",
        f"{data}/*.jsonl",
        [f"{data}/a.jsonl", f"{settings.datasets}/ds-1/prompts.jsonl"],
        "s3://bucket/prompts/a.jsonl",
    ):
        assert problems(settings, data={"prompts": prompts}) == [], prompts
    for model in (
        "gpt2",
        "Qwen/Qwen3-0.6B",
        f"{models}/x",
        f"{models}/{'x' * 300}",
        f"{settings.root}/20260101-run/model",
    ):
        assert problems(settings, policy={"model": model}) == [], model
    assert problems(settings, rewards=[{"type": "function", "path": f"{rewards}/r.py:score"}]) == []


@pytest.mark.parametrize(
    "prompts",
    [
        "/etc/passwd",
        "relative.jsonl",
        "~/p.jsonl",
        "-",
        "{data}/../secret.jsonl",
        "{data}x/p.jsonl",
        "{data}/*/../../p.jsonl",
        "/*/p.jsonl",
        "/etc/*.jsonl",
        "file:///etc/passwd",
        "http://169.254.169.254/latest",
        "s3://bucket/prompts-of-others/p.jsonl",
        "s3://bucket/prompts/../x",
        "zip://p.jsonl::/etc/x.zip",
        "s3://bucket/prompts/a::file:///etc/passwd",
        "{data}/link/p.jsonl",
        "{data}/p\0.jsonl",
        "/" + "x" * 5000,
    ],
)
def test_prompts_from_elsewhere(settings: Settings, prompts: str) -> None:
    data = settings.data_roots[0]
    (Path(data) / "link").symlink_to("/etc")
    value = prompts.replace("{data}", data)
    assert problems(settings, data={"prompts": value}) == ["data.prompts"]
    fine = f"{data}/p.jsonl"
    assert problems(settings, data={"prompts": fine, "eval_prompts": value}) == ["data.eval_prompts"]
    assert problems(settings, data={"prompts": [fine, value]}) == ["data.prompts.1"]


@pytest.mark.parametrize(
    "model",
    [
        "/etc",
        "{models}/../secret",
        "../up",
        "./here",
        "a/b/c",
        "{models}/link",
        "{root}/x/checkpoints",
        "{root}/x/y/model",
        "org/m\n",
    ],
)
def test_models_from_elsewhere(settings: Settings, model: str) -> None:
    (settings.model_roots[0] / "link").symlink_to("/etc")
    value = model.replace("{models}", str(settings.model_roots[0])).replace("{root}", str(settings.root))
    assert problems(settings, policy={"model": value}) == ["policy.model"]
    assert problems(settings, rewards=[{"type": "model", "model": value}]) == ["rewards.0.model"]


@pytest.mark.parametrize(
    ("base", "allowed"),
    [
        ("{models}/base", True),
        ("../base", True),
        ("org/base", True),
        ("{root}/20260101-run/merged", True),
        ("/etc", False),
        ("../../rewards", False),
        ("{models}/link", False),
        ("{models}/../rewards", False),
        ("{root}/20260101-run/logs", False),
        ("/nowhere", False),
        ("org/base\n", False),
        (7, False),
    ],
)
def test_the_base_of_an_adapter_must_be_allowed_too(base: Any, allowed: bool, settings: Settings) -> None:
    models = settings.model_roots[0]
    for folder in (models / "sft", models / "base", *(settings.root / "20260101-run" / n for n in ("merged", "logs"))):
        folder.mkdir(parents=True)
    (models / "link").symlink_to("/etc")
    if isinstance(base, str):
        base = base.replace("{models}", str(models)).replace("{root}", str(settings.root))
    (models / "sft" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    reward = [{"type": "model", "model": str(models / "sft")}]
    assert problems(settings, policy={"model": str(models / "sft")}) == ([] if allowed else ["policy.model"])
    assert problems(settings, rewards=reward) == ([] if allowed else ["rewards.0.model"])
    assert (model_problem(str(models / "sft"), settings) is None) == allowed


def test_a_folder_here_is_no_hub_id(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "org" / "policy").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert problems(settings, policy={"model": "org/policy"}) == ["policy.model"]


@pytest.mark.parametrize(
    "path", ["/tmp/evil.py:run", "{rewards}/../evil.py:run", "evil.py:run", "{rewards}/link.py:run"]
)
def test_code_from_elsewhere(settings: Settings, path: str, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("")
    (settings.reward_roots[0] / "link.py").symlink_to(tmp_path / "evil.py")
    value = path.replace("{rewards}", str(settings.reward_roots[0]))
    assert problems(settings, rewards=[{"type": "function", "path": value}]) == ["rewards.0.path"]


def test_a_clone_may_keep_what_its_run_has_and_no_more(settings: Settings) -> None:
    source = {"rewards": [{"type": "function", "path": "/elsewhere/r.py:score"}]}
    kept = [{"type": "function", "path": "/elsewhere/r.py:score"}]
    changed = [{"type": "function", "path": "/elsewhere/other.py:score"}]
    assert problems(settings, trusted=source, rewards=kept) == []
    assert problems(settings, trusted=source, rewards=changed) == ["rewards.0.path"]


@pytest.mark.parametrize(
    ("url", "refused"),
    [
        ("https://***@judge/s", True),
        ("https://judge/s?model=x&access_token=***", True),
        ("https://judge/***?note=**", False),
        ("https://me:right@judge/s", False),
    ],
)
def test_hidden_credentials(settings: Settings, url: str, refused: bool) -> None:
    rewards = [{"type": "http", "url": url}]
    assert problems(settings, rewards=rewards) == (["rewards.0.url"] if refused else [])
    assert problems(settings, trusted={"rewards": rewards}, rewards=rewards) == []


def test_the_root_is_the_services(settings: Settings) -> None:
    assert owned(TREE, settings)["root"] == str(settings.root)
    assert owned({**TREE, "root": str(settings.root)}, settings)["root"] == str(settings.root)
    with pytest.raises(UserError, match="leave root out"):
        owned({**TREE, "root": "/elsewhere"}, settings)


def test_secrets_are_not_shown() -> None:
    tree = {"rewards": [{"url": "https://user:pass@judge:8443/s?model=x&access_token=abc#f"}], "name": "a@b"}
    assert redacted(tree) == {"rewards": [{"url": "https://***@judge:8443/s?model=x&access_token=***"}], "name": "a@b"}


def test_short_yaml_holds_what_differs_and_reads_back(settings: Settings) -> None:
    import yaml

    config = parse_config({**TREE, "train": {"steps": 7}})
    short = yaml.safe_load(short_yaml(config))
    assert short == {**TREE, "train": {"steps": 7}}
    assert parse_config(short) == config
