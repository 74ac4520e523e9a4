"""The plan of a run whose models lie in a store: as if they were here, and problems in terms of the addresses."""

from __future__ import annotations

import json

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from cluster.config.run import parse_config
from cluster.planning.plan import find_problems, make_plan
from tests.support import remote_stores
from trainers.tiny_models import make_tokenizer


def save(folder, kind=Qwen3ForCausalLM, *, words=(), **changes):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(words))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(
        vocab_size=len(tokenizer), **sizes, num_key_value_heads=1, head_dim=16, max_position_embeddings=128, **changes
    )
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a policy, a reward model, and a teacher of another family."""
    root = tmp_path_factory.mktemp("models")
    save(root / "policy")
    save(root / "judge", Qwen3ForSequenceClassification, num_labels=1)
    save(root / "other", words=["zebra"])
    return root


@pytest.fixture
def bucket(models):
    """The same in a store."""
    for folder in models.iterdir():
        remote_stores.upload(folder, f"memory://bucket/{folder.name}")
    yield "memory://bucket"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def make(tmp_path):
    def build(models, **changes):
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "37+48="}\n{"prompt": "1+2="}\n')
        tree = {
            "root": str(tmp_path / "runs"),
            "policy": {"model": f"{models}/policy", "dtype": "float32"},
            "data": {"prompts": str(tmp_path / "prompts.jsonl"), "max_prompt_tokens": 64},
            "rewards": [{"type": "model", "model": f"{models}/judge"}],
            "algorithm": {"type": "grpo"},
            "sampling": {"max_tokens": 16, "n": 4},
            "train": {"prompts_per_step": 2, "steps": 3},
        }
        return parse_config({**tree, **changes})

    return build


def problems(config):
    return {problem.where: problem.message for problem in find_problems(config)}


def test_a_plan_is_the_same_whether_the_models_are_here_or_in_a_store(make, models, bucket):
    there, here = make_plan(make(bucket), gpus=False), make_plan(make(models), gpus=False)
    assert there.problems == here.problems == ()
    assert there.memory == here.memory
    assert there.memory
    assert there.arithmetic == here.arithmetic
    assert there.roles == here.roles
    assert there.config == make(bucket)


def test_every_kind_of_model_may_lie_in_a_store(make, bucket):
    assert problems(make(bucket, algorithm={"type": "ppo", "critic": {"model": f"{bucket}/judge"}})) == {}
    assert problems(make(bucket, algorithm={"type": "gkd", "teacher": {"model": f"{bucket}/policy"}})) == {}


def test_problems_name_the_address(make, bucket, tmp_path):
    teacher = {"type": "gkd", "teacher": {"model": f"{bucket}/other"}}
    assert "its vocabulary is not the policy's" in problems(make(bucket, algorithm=teacher))["algorithm.teacher.model"]
    found = problems(make(bucket, rewards=[{"type": "model", "model": f"{bucket}/policy"}]))
    assert found["rewards.0.model"].startswith(f"{bucket}/policy is not a sequence-classification checkpoint")
    assert str(tmp_path) not in found["rewards.0.model"]
    wanted = {"model": f"{bucket}/policy", "train_type": "lora", "lora": {"target_modules": ["query"]}}
    assert (
        "no linear layer of the model is called query"
        in problems(make(bucket, policy=wanted))["policy.lora.target_modules"]
    )


def test_what_the_store_has_not_comes_with_all_other_problems(make, bucket):
    config = make(bucket, policy={"model": f"{bucket}/none"}, sampling={"n": 1}, data={"prompts": "/none.jsonl"})
    found = problems(config)
    assert found["policy.model"] == f"no such folder: {bucket}/none"
    assert {"sampling.n", "/none.jsonl"} <= set(found)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            "memory://bucket/policy",
            "is the address memory://bucket/policy; only a folder or a hub id can be a base",
        ),
        ("/nowhere/base", "is not here: /nowhere/base"),
    ],
)
def test_an_adapter_in_a_store_has_a_base_that_is_not(make, bucket, base, message):
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 8, "lora_alpha": 16}
    weights = remote_stores.save(remote_stores.TENSORS)
    remote_stores.put(
        f"{bucket}/sft", {"adapter_config.json": json.dumps(config), "adapter_model.safetensors": weights}
    )
    found = problems(make(bucket, policy={"model": f"{bucket}/sft"}))
    assert message in found["policy.model"]
    assert f"the base of {bucket}/sft" in found["policy.model"]


def test_an_adapter_in_a_store_on_a_base_that_is_here(make, models, bucket):
    config = {"peft_type": "LORA", "base_model_name_or_path": str(models / "policy"), "r": 8, "lora_alpha": 16}
    weights = remote_stores.save(remote_stores.TENSORS)
    remote_stores.put(
        f"{bucket}/sft", {"adapter_config.json": json.dumps(config), "adapter_model.safetensors": weights}
    )
    assert problems(make(bucket, policy={"model": f"{bucket}/sft", "dtype": "float32"})) == {}
