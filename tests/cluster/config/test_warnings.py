"""What was probably not meant: each warning where it should come, and not where a little less would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config.checks import cross_checks
from cluster.config.run import load_config, parse_config, run_schema
from cluster.config.tree import set_path
from cluster.config.warnings import advise
from trainers.errors import UserError

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").rglob("*.yaml"))
BILLION = 1_000_000_000
MODEL = {"type": "model", "model": "org/judge"}
RULE = {"type": "function", "path": "/rules.py:right"}


def warnings(kind: str, changes: dict[str, Any], *, parameters: int | None = None) -> dict[str, str]:
    """Message by key, of a config that has none before it is changed."""
    algorithm: dict[str, Any] = {"type": kind, **({"teacher": {"model": "org/teacher"}} if kind == "gkd" else {})}
    tree: dict[str, Any] = {
        "policy": {"model": "org/policy"},
        "data": {"prompts": "p.jsonl", "eval_prompts": "e.jsonl"},
        "rewards": [] if kind == "gkd" else [MODEL],
        "algorithm": algorithm,
    }
    for path, value in changes.items():
        tree = set_path(tree, path, value)
    config = parse_config(tree)
    assert cross_checks(config) == []  # else it is a problem, and no warning is needed
    found = advise(config, parameters=parameters)
    assert len({problem.where for problem in found}) == len(found)
    return {problem.where: problem.message for problem in found}


@pytest.mark.parametrize("kind", ["grpo", "ppo", "gkd"])
def test_the_defaults_are_meant(kind: str) -> None:
    assert warnings(kind, {}, parameters=BILLION) == {}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_meant(path: Path) -> None:
    """Their models have about a hundred thousand parameters, which is not known before they are made."""
    assert advise(load_config(path)) == advise(load_config(path), parameters=100_000) == []


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize(
    ("kind", "key", "fine", "odd"),
    [
        ("grpo", "algorithm.kl.coef", 0.15, 0.16),  # 0.05 to 0.1, by once its width of 0.05
        ("ppo", "algorithm.kl.coef", 0.02, 1.0),
        ("ppo", "algorithm.gamma", 0.985, 0.97),  # 0.99 to 1
        ("ppo", "algorithm.lam", 0.85, 0.7),  # 0.9 to 1
        ("gkd", "sampling.temperature", 0.3, 0.1),  # 0.7 to 1.2
        ("grpo", "sampling.temperature", 1.6, 2.0),
        ("grpo", "sampling.n", 124, 125),  # 4 to 64
        ("grpo", "train.epochs_per_step", 7, 8),  # 1 to 4
        ("gkd", "train.max_grad_norm", 1.8, 10),  # 0.1 to 1
        ("gkd", "train.weight_decay", 0.2, 0.5),  # 0 to 0.1
    ],
)
def test_far_from_what_is_recommended(kind: str, key: str, fine: float, odd: float) -> None:
    assert warnings(kind, {key: fine}) == {}
    ((where, message),) = warnings(kind, {key: odd}).items()
    assert where == key
    assert message.startswith(f"{odd:g} is far from the usual ")
    assert message.endswith("; set one of these")


def test_every_end_that_can_be_left_has_its_reason() -> None:
    """Whatever a field with a range takes, the advice has words for it."""
    with_all = {"policy.model": "p", "policy.train_type": "lora", "data.prompts": "p", "train.updates_per_step": 2}
    algorithms = {"gkd": {"type": "gkd", "teacher": {"model": "t"}}, "grpo": {"type": "grpo"}, "ppo": {"type": "ppo"}}
    for leaf in run_schema().leaves():
        taken = 0
        for value in (0, 1, 512, 1e-9, 0.5, 9.9, 1e6) if leaf.recommended else ():
            tree: dict[str, Any] = {"algorithm": algorithms[(*leaf.types, "grpo")[0]]}
            for path, entry in {**with_all, leaf.path: value}.items():
                tree = set_path(tree, path, entry)
            try:
                config = parse_config(tree)
            except UserError:
                continue
            taken += 1
            assert all(warning.message for warning in advise(config))
        assert taken >= 2 or not leaf.recommended, leaf.path


def test_a_range_counts_where_its_key_does() -> None:
    wide = {"policy.lora.r": 256, "policy.lora.alpha": 1000.0}
    rate = {"train.learning_rate": 1e-3}
    assert warnings("grpo", wide) == {}
    assert set(warnings("grpo", {**wide, **rate, "policy.train_type": "lora"})) == set(wide)
    adaptive = warnings("grpo", {**wide, **rate, "policy.train_type": "adalora"})
    assert set(adaptive) == set(wide)
    assert "has no effect" in adaptive["policy.lora.r"]  # and is not far from anything
    critic = {"algorithm.critic.train_type": "lora"}
    assert set(warnings("ppo", {**wide, **critic})) == set(wide)
    assert warnings("ppo", {"sampling.n": 1}) == {}
    assert warnings("grpo", {"algorithm.clip_high": 0.6}) == {}  # one update a step: every ratio is 1
    assert set(warnings("grpo", {"algorithm.clip_high": 0.6, "train.updates_per_step": 2})) == {"algorithm.clip_high"}


@pytest.mark.parametrize(
    ("train_type", "fine", "odd"), [("lora", 1e-5, 9e-6), ("qlora", 2e-4, 1e-6), ("adalora", 1e-4, 5e-5)]
)
def test_an_adapters_learning_rate(train_type: str, fine: float, odd: float) -> None:
    def rate(value: float) -> dict[str, str]:
        return warnings("grpo", {"policy.train_type": train_type, "train.learning_rate": value})

    assert rate(fine) == {}
    assert f"{odd:g} is low for {train_type}" in rate(odd)["train.learning_rate"]
    assert list(warnings("grpo", {"policy.train_type": train_type})) == ["train.learning_rate"]  # the default is full's


def test_a_large_models_learning_rate() -> None:
    def rate(value: float, parameters: int | None, kind: str = "grpo") -> list[str]:
        return list(warnings(kind, {"train.learning_rate": value}, parameters=parameters))

    assert rate(2e-5, BILLION) == []
    assert rate(3e-5, BILLION) == ["train.learning_rate"]
    assert rate(3e-5, 99_999_999) == rate(3e-5, None) == rate(3e-5, BILLION, "gkd") == []
    assert rate(0, None) == ["train.learning_rate"]


def test_a_critic_that_learns_slower_than_the_policy() -> None:
    def critic(rate: float, **changes: Any) -> list[str]:
        rates = {"train.learning_rate": 2e-4, "algorithm.critic.learning_rate": rate}
        return list(warnings("ppo", {**rates, **changes}))

    assert critic(5e-5) == []
    assert critic(4e-5) == ["algorithm.critic.learning_rate"]
    assert critic(4e-5, **{"policy.train_type": "lora"}) == []  # all of the critic's weights bear less than an adapter
    both = {"policy.train_type": "lora", "algorithm.critic.train_type": "qlora"}
    assert critic(4e-5, **both) == ["algorithm.critic.learning_rate"]


def test_few_answers_to_compare() -> None:
    assert warnings("grpo", {"sampling.n": 4}) == {}
    assert list(warnings("grpo", {"sampling.n": 3})) == ["sampling.n"]
    assert warnings("grpo", {"sampling.n": 2, "algorithm.advantage": "leave_one_out", "algorithm.scale": "none"}) == {}


def test_no_kl_term_beside_a_learned_reward() -> None:
    assert list(warnings("grpo", {"algorithm.kl.coef": 0})) == ["algorithm.kl.coef"]
    assert warnings("grpo", {"algorithm.kl.coef": 0, "rewards": [RULE]}) == {}
    watched = [RULE, {**MODEL, "weight": 0}]
    assert warnings("ppo", {"algorithm.kl.coef": 0, "rewards": watched}) == {}


def test_gkd_learns_from_no_reward() -> None:
    found = warnings("gkd", {"rewards": [{**MODEL, "weight": 0}, RULE]})
    assert list(found) == ["rewards.1.weight"]
    assert "gkd does not learn from rewards" in found["rewards.1.weight"]
    assert warnings("gkd", {"rewards": [{**MODEL, "weight": 0}]}) == {}


def test_gkd_whose_policy_never_writes() -> None:
    assert warnings("gkd", {"algorithm.lmbda": 0.1}) == {}
    assert list(warnings("gkd", {"algorithm.lmbda": 0})) == ["algorithm.lmbda"]


def test_a_reward_model_that_takes_shorter_chats() -> None:
    """1024 tokens of prompt and 512 of answer."""
    assert warnings("grpo", {"rewards.0.max_tokens": 1536}) == {}
    assert list(warnings("grpo", {"rewards.0.max_tokens": 1535})) == ["rewards.0.max_tokens"]


def test_clips_of_the_other_kind_of_ratio() -> None:
    def clips(ratio: str, size: float, updates: int = 2) -> list[str]:
        sizes = {"algorithm.clip_low": size, "algorithm.clip_high": size}
        return list(warnings("grpo", {**sizes, "algorithm.ratio": ratio, "train.updates_per_step": updates}))

    both = ["algorithm.clip_low", "algorithm.clip_high"]
    assert clips("token", 0.2) == clips("sequence", 3e-4) == []
    assert clips("token", 3e-4) == clips("sequence", 0.2) == both
    assert clips("token", 3e-4, updates=1) == clips("sequence", 0.2, updates=1) == []


def test_no_held_out_prompts() -> None:
    assert list(warnings("grpo", {"data.eval_prompts": None})) == ["data.eval_prompts"]


@pytest.mark.parametrize(
    ("steps", "every", "odd"),
    [(100, 0, True), (100, 100, True), (100, 99, False), (21, 21, True), (20, 0, False), (10, 20, False)],
)
def test_no_checkpoint_before_the_end(steps: int, every: int, odd: bool) -> None:
    found = list(warnings("grpo", {"train.steps": steps, "checkpoint.every": every}))
    assert found == (["checkpoint.every"] if odd else [])


def test_keys_that_the_train_type_does_not_read() -> None:
    changed = {"policy.train_type": "adalora", "train.learning_rate": 1e-3, "policy.lora.r": 32}
    assert warnings("grpo", changed)["policy.lora.r"].startswith("32 has no effect: adalora begins with init_r")
    assert warnings("ppo", changed | {"algorithm.critic.train_type": "lora"}).get("policy.lora.r") is None
    assert warnings("grpo", changed | {"policy.lora.r": 16, "policy.lora.init_r": 24}) == {}
    plain = {"policy.train_type": "lora", "train.learning_rate": 1e-4}
    assert warnings("grpo", plain | {"policy.lora.r": 32}) == {}
    assert "lora does not read it" in warnings("grpo", plain | {"policy.lora.tinit": 3})["policy.lora.tinit"]
