"""The config: what it takes, what it refuses and how it says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.config import docs as config_docs
from cluster.config.checks import cross_checks
from cluster.config.run import RunConfig, load_config, parse_config, resolve_paths, run_schema
from cluster.config.schema import Node, Recommended, Schema
from cluster.config.tree import set_path
from trainers.errors import UserError

SMALLEST = {
    "policy": {"model": "org/policy"},
    "data": {"prompts": "prompts.jsonl"},
    "rewards": [{"type": "model", "model": "org/judge"}],
    "algorithm": {"type": "grpo"},
}


def tree(**changes):
    return {**SMALLEST, **changes}


def refusals(value):
    with pytest.raises(UserError) as error:
        parse_config(value)
    return {p.where: p.message for p in error.value.problems}


def checks(**changes):
    return {p.where: p.message for p in cross_checks(parse_config(tree(**changes)))}


@pytest.fixture
def run_yaml(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
        return path

    return write


def test_the_smallest_file_of_the_interface_works(run_yaml):
    config = load_config(
        run_yaml(
            "policy:   {model: org/policy}\ndata:     {prompts: prompts.jsonl}\n"
            "rewards:  [{type: model, model: path/or/hub-id}]\nalgorithm: {type: grpo}\n"
        )
    )
    assert (config.seed, config.root, config.placement) == (0, "runs", "split")
    assert cross_checks(config) == []


def test_the_resolved_config_is_a_config_of_the_same_run(run_yaml):
    config = load_config(run_yaml(tree()), ["sampling.stop=[END]", "algorithm.kl.coef=0.1"])
    assert load_config(run_yaml(config.model_dump(mode="json"))) == config


def test_fewer_than_a_hundred_and_fifty_keys():
    assert len({leaf.path for leaf in run_schema().leaves()}) < 150


def test_every_leaf_has_a_help_text():
    assert [leaf.path for leaf in run_schema().leaves() if not leaf.help] == []


def test_recommended_ranges_hold_the_defaults_and_what_is_allowed():
    """They are in the schema, for the page's form; the docs say them from there."""
    found = {(leaf.path, leaf.types): leaf for leaf in run_schema().leaves() if leaf.recommended is not None}
    coefficient = found["algorithm.kl.coef", ("grpo", "ppo")]
    assert coefficient.recommended == Recommended(0.05, 0.1)
    sections = RunConfig.model_json_schema()["$defs"]
    assert sections["KLConfig"]["properties"]["coef"]["recommended"] == [0.05, 0.1]
    assert sections["SamplingConfig"]["properties"]["n"]["recommended_for"] == ["grpo"]
    assert "0 loads no reference. Recommended: 0.05 to 0.1. (for" in config_docs.render()
    assert "(the group size). Recommended for `grpo`: 4 to 64. |" in config_docs.render()
    assert len(found) >= 12
    algorithms = {"gkd": {"type": "gkd", "teacher": {"model": "org/teacher"}}, "grpo": {"type": "grpo"}}
    for leaf in found.values():
        low, high = leaf.recommended.low, leaf.recommended.high
        assert low <= float(leaf.default) <= high, leaf.path
        algorithm = algorithms.get((*leaf.types, "grpo")[0], {"type": "ppo"})
        for end in (low, high):
            parse_config(set_path(tree(algorithm=algorithm), leaf.path, end))


def test_the_page_of_the_docs_is_current():
    page = Path(__file__).parents[3] / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == config_docs.render(), "run the command that the page names"


@pytest.mark.parametrize(
    "module", ["cluster.config.run", "cluster.cli.main", "cluster.config.docs", "cluster.config.tree"]
)
def test_no_engine_is_imported(module):
    heavy = "{'torch', 'ray', 'vllm', 'deepspeed', 'transformers'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- what is refused, and how


def test_an_unknown_key_is_answered_with_the_nearest():
    found = refusals(
        tree(
            policy={"modle": "x", "model": "x"},
            learning_rate=1e-5,
            train={"n": 4, "temperature": 2},
            rewards=[{"type": "model", "model": "m", "wieght": 2}],
            zzz=1,
        )
    )
    assert found == {
        "policy.modle": "unknown key; did you mean policy.model?",
        "learning_rate": "unknown key; did you mean train.learning_rate or algorithm.critic.learning_rate?",
        "train.n": "unknown key; did you mean sampling.n or eval.n?",
        "train.temperature": "unknown key; did you mean algorithm.temperature or sampling.temperature?",
        "rewards.0.wieght": "unknown key; did you mean rewards.0.weight?",
        "zzz": "unknown key; `rlhf plan` lists all",
    }


@pytest.mark.parametrize("key", ["top_p", "top_k", "min_p", "repetition_penalty"])
def test_options_under_which_generator_and_trainer_differ_are_refused_with_the_reason(key):
    (message,) = refusals(tree(sampling={key: 0.9})).values()
    assert "another distribution" in message


@pytest.mark.parametrize(
    ("changes", "where", "message"),
    [
        ({"sampling": {"n": True}}, "sampling.n", "expected integer ≥ 1, found true"),
        ({"sampling": {"n": "8"}}, "sampling.n", 'expected integer ≥ 1, found the text "8"'),
        ({"sampling": {"n": 8.0}}, "sampling.n", "expected integer ≥ 1, found 8.0"),
        ({"sampling": {"n": 0}}, "sampling.n", "expected integer ≥ 1, found 0"),
        ({"sampling": {"stop": "END"}}, "sampling.stop", 'expected list of strings, found the text "END"'),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate", "expected a finite number, found nan"),
        ({"train": {"learning_rate": float("inf")}}, "train.learning_rate", "expected a finite number, found inf"),
        ({"name": 5}, "name", "expected string, found 5"),
        ({"name": "a/b"}, "name", "expected letters, digits"),
        ({"seed": -1}, "seed", "expected integer ≥ 0, < 4294967296, found -1"),
        ({"data": {"prompts": 3}}, "data.prompts", "expected string, or list of strings, found 3"),
        ({"data": {"prompts": ["a", 3]}}, "data.prompts", 'or list of strings, found the list ["a", 3]'),
        ({"data": {}}, "data.prompts", "required, but missing; expected string, or list of strings"),
        ({"policy": {"model": "m", "dtype": "fp16"}}, "policy.dtype", "expected one of float32, bfloat16, found"),
        ({"policy": "m"}, "policy", "section (model, adapter, dtype, train_type, lora, chat_template), found the text"),
        ({"train": [1]}, "train", "expected section (steps, "),
        ({"sync": None}, "sync", "found nothing (null)"),
        ({"rewards": {"type": "model"}}, "rewards", "expected list of sections"),
        ({"rewards": [7]}, "rewards.0", "expected section with `type` one of"),
        ({"rewards": [{"type": "modl"}]}, "rewards.0.type", 'http, model, found the text "modl"'),
        ({"rewards": [{"model": "m"}]}, "rewards.0.type", "required, but missing; expected one of"),
        ({"algorithm": {}}, "algorithm.type", "required, but missing; expected one of gkd, grpo, ppo"),
        ({"algorithm": {"type": "dpo"}}, "algorithm.type", 'expected one of gkd, grpo, ppo, found the text "dpo"'),
        (
            {"algorithm": {"type": "gkd", "teacher": {"model": "t", "served": True}}, "rewards": []},
            "algorithm",
            "set algorithm.top_k",
        ),
        (
            {
                "algorithm": {
                    "type": "gkd",
                    "teacher": {"model": "t", "served": True},
                    "top_k": 8,
                    "temperature": 0.5,
                },
                "rewards": [],
            },
            "algorithm",
            "those at temperature 1",
        ),
        (
            {"algorithm": {"type": "grpo", "kl": {"controller": "adaptive"}}},
            "algorithm.kl",
            "needs algorithm.kl.target",
        ),
    ],
)
def test_a_wrong_value_says_what_was_expected_and_what_was_found(changes, where, message):
    found = refusals(tree(**changes))
    assert list(found) == [where]
    assert message in found[where]


def test_missing_sections_and_every_other_problem_come_at_once():
    found = refusals({"policy": {}, "sampling": {"n": 0, "temperature": -1}, "x": 1})
    assert set(found) == {
        "policy.model", "data", "algorithm", "sampling.n", "sampling.temperature", "x",
    }  # fmt: skip
    assert found["data"].startswith("required, but missing; expected section (prompts, ")


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse_config(tree()).seed = 1  # type: ignore[misc]


# --- files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; expected the sections policy, data"),
        ("# nothing\n", "is empty"),
        ("- a\n- b\n", 'holds the list ["a", "b"]; expected the sections'),
        ("hello", 'holds the text "hello"'),
        ("a: [1", "not valid YAML"),
    ],
)
def test_a_file_that_holds_no_config_says_what_it_holds(run_yaml, text, message):
    path = run_yaml(text)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(path) in error.value.problems[0].where
    assert message in error.value.problems[0].message


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "no.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 9\)"):
        load_config(tmp_path / "latin.yaml")


def test_a_byte_order_mark_is_no_key(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree()), encoding="utf-8-sig")
    assert load_config(path).policy.model == "org/policy"


# --- paths


def test_paths_in_the_file_count_from_its_folder_and_overrides_from_here(tmp_path, monkeypatch):
    folder, here = tmp_path / "configs", tmp_path / "here"
    (folder / "models" / "policy").mkdir(parents=True)
    here.mkdir()
    rewards = [{"type": "function", "path": "rule.py:score"}, {"type": "model", "model": "org/judge"}]
    value = tree(
        policy={"model": "models/policy"}, rewards=rewards, data={"prompts": ["a.jsonl", "s3://bucket/b.jsonl"]}
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(value))
    monkeypatch.chdir(here)
    config = load_config("../configs/run.yaml", ["data.eval_prompts=eval.jsonl"])
    assert config.policy.model == str(folder / "models" / "policy")
    assert config.data.prompts == [str(folder / "a.jsonl"), "s3://bucket/b.jsonl"]
    assert config.data.eval_prompts == str(here / "eval.jsonl")
    assert config.rewards[0].path == f"{folder / 'rule.py'}:score"
    assert config.rewards[1].model == "org/judge"


def test_resolving_leaves_shapes_alone_that_are_wrong_and_its_argument_unchanged(tmp_path):
    value = {"data": 5, "rewards": {"path": "x"}, "policy": {"model": ["m"]}}
    assert resolve_paths(value, tmp_path) == value
    value = {"data": {"prompts": "p.jsonl"}}
    resolve_paths(value, tmp_path)
    assert value["data"]["prompts"] == "p.jsonl"


@pytest.mark.parametrize(
    ("written", "is_path"),
    [
        ("./m", True),
        ("../m", True),
        ("a/b/c", True),
        ("there/m", True),
        ("there", True),
        ("org/m", False),
        ("m", False),
    ],
)
def test_what_may_be_a_hub_id_stays(tmp_path, written, is_path):
    (tmp_path / "there").mkdir()
    found = resolve_paths({"policy": {"model": written}}, tmp_path)["policy"]["model"]
    assert found == (os.path.normpath(tmp_path / written) if is_path else written)


# --- between keys


@pytest.mark.parametrize(
    ("changes", "where", "message"),
    [
        ({"generators": {"max_model_len": 1535}}, "generators.max_model_len", "1024 + 512 = 1536"),
        (
            {"train": {"prompts_per_step": 1}, "sampling": {"n": 2}, "learners": {"workers": 3}},
            "learners.workers",
            "3 ranks, but a step has only 2 samples",
        ),
        ({"train": {"updates_per_step": 257}}, "train.updates_per_step", "257 updates cannot be cut from 256 samples"),
        (
            {"train": {"warmup_steps": 101}},
            "train.warmup_steps",
            "101 optimizer steps is longer than the run, which has 100",
        ),
        ({"sampling": {"n": 1}}, "sampling.n", "every advantage is 0"),
        ({"rewards": [{"type": "model", "model": "m", "weight": 0}]}, "rewards", "nothing to learn from"),
        ({"rewards": []}, "rewards", "is empty, but grpo learns from scores"),
        (
            {"algorithm": {"type": "ppo", "critic": {"warmup_steps": 100}}},
            "algorithm.critic.warmup_steps",
            "100 of 100 steps train the critic only",
        ),
        (
            {"algorithm": {"type": "grpo", "overlong": {"max_tokens": 600, "buffer_tokens": 10}}},
            "algorithm.overlong.max_tokens",
            "600 is more than any completion has",
        ),
        (
            {
                "algorithm": {"type": "gkd", "teacher": {"model": "t"}},
                "rewards": [],
                "train": {"importance_correction": {}},
            },
            "train.importance_correction",
            "gkd has none",
        ),
        (
            {"policy": {"model": "m", "train_type": "adalora", "lora": {"tinit": 50, "tfinal": 50}}},
            "policy.lora.tfinal",
            "the first 50 (tinit) and the last 50 (tfinal) of 100 optimizer steps",
        ),
        (
            {
                "policy": {"model": "m", "train_type": "adalora", "lora": {"tinit": 10, "tfinal": 20}},
                "algorithm": {"type": "ppo", "critic": {"warmup_steps": 75}},
            },
            "policy.lora.tfinal",
            "the first 10 (tinit) and the last 20 (tfinal) of 25 optimizer steps",
        ),
        (
            {"train": {"warmup_steps": 26}, "algorithm": {"type": "ppo", "critic": {"warmup_steps": 75}}},
            "train.warmup_steps",
            "longer than the run, which has 25 of the policy",
        ),
        (
            {"policy": {"model": "m", "train_type": "lora"}, "sync": {"transport": "nccl"}},
            "sync.transport",
            "cannot send an adapter",
        ),
        ({"learners": {"offload": "all"}}, "learners.offload", "offload: all requires learners.zero_stage: 3"),
        (
            {"policy": {"model": "m", "dtype": "float32"}, "learners": {"offload": "optimizer", "zero_stage": 0}},
            "learners.offload",
            "offload: optimizer requires learners.zero_stage: 1",
        ),
        ({"sync": {"transport": "nccl"}, "placement": "colocated"}, "sync.transport", "use ipc"),
        ({"sync": {"transport": "ipc"}}, "sync.transport", "requires placement: colocated"),
        ({"placement": "colocated", "generators": {"replicas": 2}}, "generators.replicas", "2 engines and 1 ranks"),
        (
            {"placement": "colocated", "generators": {"tensor_parallel": 2}, "learners": {"workers": 2}},
            "generators.tensor_parallel",
            "requires tensor_parallel: 1",
        ),
        ({"data": {"prompts": "-"}}, "data.prompts", "standard input"),
    ],
)
def test_keys_that_contradict_each_other(changes, where, message):
    found = checks(**changes)
    assert list(found) == [where]
    assert message in found[where]


@pytest.mark.parametrize(
    "changes",
    [
        {"generators": {"max_model_len": 1536}},
        {"train": {"updates_per_step": 256}},
        {"train": {"warmup_steps": 100}},
        {"learners": {"offload": "all", "zero_stage": 3}},
        {"eval": {"every": 5}},
    ],
)
def test_what_just_fits_is_accepted(changes):
    assert checks(**changes) == {}


# --- the schema


def test_locations_of_pydantic_become_dotted_paths():
    schema = run_schema()
    assert schema.locate(("rewards", 0, "model", "model"))[0] == "rewards.0.model"
    assert schema.locate(("data", "prompts", "list[str]", 1))[0] == "data.prompts"
    assert schema.locate(("train", "importance_correction", "cap"))[0] == "train.importance_correction.cap"
    assert schema.locate(("policy", "modle")) == ("policy.modle", None)


def test_alternatives_say_which_of_them_has_a_key():
    leaves = {leaf.path: leaf for leaf in run_schema().leaves()}
    assert leaves["rewards.*.path"].types == ("function",)
    assert leaves["rewards.*.weight"].types == ()
    assert leaves["rewards.*.type"].accepts == "one of function, http, model"


def test_a_schema_of_any_pydantic_model_can_be_read():
    assert isinstance(Schema(RunConfig.model_json_schema()).describe(Node(type="string")), str)
