"""A policy that is an adapter: merged, continued or refused; expected numbers are plain PEFT's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.config import LoraConfig, PolicyConfig
from actors.learner.critic import load_critic
from actors.modeling.causal_lm import load_policy, load_tokenizer
from actors.modeling.merge import write_merged
from actors.modeling.peft_adapters import reference_weights, trained_parameters
from actors.modeling.policy_source import find_origin
from tests.support import tiny
from tests.support.tiny_adapters import change, make_adapter
from trainers.adapter_folder import find_base, is_adapter, read_adapter, tokenizer_source
from trainers.algorithms.config import CriticConfig
from trainers.errors import UserError
from trainers.tiny_models import make_random_policy

pytestmark = [  # PEFT's warnings about the adapters that are made here
    pytest.mark.filterwarnings("ignore:Model (has|with) .tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested .ensure_weight_tying:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]

TOKENS = torch.arange(3, 23).reshape(2, 10)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_policy(tmp_path_factory.mktemp("base") / "policy", tied=True)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(base, tmp_path / "sft")


def policy_of(path: Path, **fields: Any) -> PolicyConfig:
    return PolicyConfig(model=str(path), **({"dtype": "float32"} | fields))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def plain(base: Path, adapter: Path) -> Any:
    """The oracle."""
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)


def message_of(policy: PolicyConfig) -> tuple[str, str]:
    with pytest.raises(UserError) as error:
        find_origin(policy)
    (problem,) = error.value.problems
    return problem.where, problem.message


# --- merge

LAYERS = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "lora": peft.LoraConfig(r=3, target_modules=LAYERS),
    "dora": peft.LoraConfig(r=3, target_modules=LAYERS, use_dora=True, use_rslora=True),
    "ranks": peft.LoraConfig(r=3, target_modules=LAYERS, rank_pattern={"q_proj": 5}, bias="none"),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, target_modules=LAYERS, total_step=10),
    "loha": peft.LoHaConfig(r=3, target_modules=LAYERS),
    "lokr": peft.LoKrConfig(r=3, target_modules=LAYERS),
    "ia3": peft.IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"]),
    "head": peft.LoraConfig(r=3, target_modules=LAYERS, modules_to_save=["lm_head"]),
    "embeddings, tied together": peft.LoraConfig(
        r=3, target_modules=LAYERS, modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "embedding": peft.LoraConfig(r=3, target_modules=[*LAYERS, "embed_tokens"]),
    "lora on the head": peft.LoraConfig(r=3, target_modules=[*LAYERS, "lm_head"]),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_merged_model_computes_what_peft_computes(kind: str, tied: bool, tmp_path: Path) -> None:
    base = tiny.make_policy(tmp_path / "base", tied=tied)
    adapter = make_adapter(base, tmp_path / "sft", config=KINDS[kind])
    origin = find_origin(policy_of(adapter))
    assert origin.policy.model == str(base)
    assert origin.merged is not None
    assert origin.in_run(tmp_path / "merged") == policy_of(tmp_path / "merged")
    write_merged(origin.policy, origin.merged, tmp_path / "merged")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    torch.testing.assert_close(found, logits(plain(base, adapter)), rtol=0, atol=1e-5)
    assert (found - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.01, (
        "the comparison would prove nothing"
    )
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (tied and kind not in ("head", "embedding", "lora on the head"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tokens_that_the_adapters_training_added_are_merged_too(tied: bool, tmp_path: Path) -> None:
    base = tiny.make_policy(tmp_path / "base", tied=tied)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    size = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(size + 3)
    config = peft.LoraConfig(target_modules=LAYERS, modules_to_save=["embed_tokens", "lm_head"])
    trained = peft.get_peft_model(model, config)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    trained.save_pretrained(tmp_path / "sft")
    origin = find_origin(policy_of(tmp_path / "sft"))
    assert origin.merged is not None
    write_merged(origin.policy, origin.merged, tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert found.config.vocab_size == size + 3
    torch.testing.assert_close(logits(found), logits(trained), rtol=0, atol=1e-5)


def test_a_merged_policy_is_written_once_and_completely(base: Path, adapter: Path, tmp_path: Path) -> None:
    """In the policy's type, with tokenizer and template; what a killed writer left is not a model."""
    (tmp_path / ".merged.partial").mkdir()
    (tmp_path / ".merged.partial" / "stale").write_text("")
    origin = find_origin(policy_of(adapter, dtype="bfloat16", chat_template="{{ messages }}"))
    assert origin.merged is not None
    write_merged(origin.policy, origin.merged, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "{{ messages }}"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["merged", "sft"]
    before = (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns
    write_merged(origin.policy, origin.merged, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("change_of", ["shape", "name"])
def test_an_adapter_that_does_not_fit_its_base_is_named(
    change_of: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """What the files' headers do not tell."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    name, tensor = next(iter(tensors.items()))
    if change_of == "shape":
        tensors[name] = tensor[:-1].contiguous()
    else:
        tensors[name.replace("down_proj", "side_proj")] = tensors.pop(name)
    save_file(tensors, adapter / "adapter_model.safetensors")
    origin = find_origin(policy_of(adapter))
    assert origin.merged is not None
    with pytest.raises(UserError, match=r"policy\.model: .* does not fit"):
        write_merged(origin.policy, origin.merged, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# --- continue


def continued(adapter: Path, **fields: Any) -> Any:
    origin = find_origin(policy_of(adapter, train_type="lora", adapter="continue", **fields))
    assert origin.continued is not None
    assert (origin.policy.lora.r, origin.policy.lora.alpha) == (3, 5.0)
    return load_policy(origin.policy, total_steps=1, adapter=origin.continued)


def test_a_continued_adapter_begins_as_it_is_and_keeps_itself_as_reference(base: Path, adapter: Path) -> None:
    model = continued(adapter)
    before = logits(plain(base, adapter))
    saved = load_file(adapter / "adapter_model.safetensors")
    trained = {name.replace(".default", ""): parameter for name, parameter in trained_parameters(model)}
    assert trained.keys() == saved.keys()
    assert all(torch.equal(trained[name], saved[name]) for name in saved)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.1
    with reference_weights(model):
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    assert (logits(model) - before).abs().max() > 0.01
    assert {name.replace(".default", "") for name, _ in trained_parameters(model)} == saved.keys()


def test_a_continued_adapter_has_no_dropout_and_the_policys_type(adapter: Path) -> None:
    model = continued(adapter, dtype="bfloat16").train()
    with torch.no_grad():
        first, second = (model(input_ids=TOKENS).logits for _ in range(2))
    assert torch.equal(first, second)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_critic_is_a_copy_of_the_policy_with_its_adapter(base: Path, adapter: Path) -> None:
    """Below the head: the last hidden states of plain PEFT."""
    folder = read_adapter(adapter, where="policy.model")
    critic: Any = load_critic(str(base), CriticConfig(), LoraConfig(), dtype="float32", adapter=folder)
    assert all(parameter.requires_grad for parameter in critic.parameters())
    with torch.no_grad():
        found = critic.eval().model(input_ids=TOKENS).last_hidden_state
        expected = plain(base, adapter).eval().base_model.model.model(input_ids=TOKENS).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# --- what the folder holds


def test_tokenizer_and_template_are_the_adapters_where_it_has_them(base: Path, adapter: Path) -> None:
    on_base, found = find_origin(policy_of(adapter)).policy, read_adapter(adapter, where="policy.model")
    assert tokenizer_source(str(adapter)) == str(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert load_tokenizer(on_base, found).chat_template == tokenizer.chat_template
    tokenizer.chat_template = "of the adapter"
    tokenizer.save_pretrained(adapter)
    assert load_tokenizer(on_base, found).chat_template == "of the adapter"


def test_a_relative_base_counts_from_the_adapters_folder_then_from_here(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "near").symlink_to(base)
    (adapter / "near").mkdir()
    change(adapter, base_model_name_or_path="near")
    assert find_base(adapter) == str(adapter / "near")
    (adapter / "near").rmdir()
    assert find_base(adapter) == str(tmp_path / "near")
    change(adapter, base_model_name_or_path="org/base", revision=None)
    assert find_base(adapter) == "org/base"


def test_a_full_model_is_not_an_adapter(base: Path) -> None:
    assert not is_adapter(base)
    assert not is_adapter("org/name")
    assert not is_adapter("/" + "x" * 300)
    assert find_origin(policy_of(base)).policy == policy_of(base)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "of kind PROMPT_TUNING; give one of LORA"),
        ({"base_model_name_or_path": "/nowhere/base"}, "is not here: /nowhere/base"),
        ({"base_model_name_or_path": "/" + "x" * 300}, "is not here"),
        ({"base_model_name_or_path": "a\0b"}, "is not here"),
        ({"base_model_name_or_path": "../gone"}, "to the present path"),
        ({"base_model_name_or_path": None}, "names no base"),
        ({"base_model_name_or_path": "."}, "is an adapter itself"),
        ({"base_model_name_or_path": "org/base", "revision": "v2"}, "is revision v2 of org/base"),
    ],
)
def test_adapters_that_cannot_be_used(values: dict[str, Any], message: str, adapter: Path) -> None:
    change(adapter, **values)
    where, found = message_of(policy_of(adapter))
    assert where == "policy.model"
    assert message in found


def test_weights_that_are_missing_torn_or_can_run_code(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(b"\xff" * 20)
    assert "is not a complete safetensors file" in message_of(policy_of(adapter))[1]
    weights.unlink()
    assert message_of(policy_of(adapter))[1].endswith("holds no adapter_model.safetensors")
    (adapter / "adapter_model.bin").write_bytes(b"")
    assert "is a pickle, which can run code" in message_of(policy_of(adapter))[1]


@pytest.mark.parametrize("text", ["{", "[]", "\udcff", "[" * 100_000, "{" + " " * (1 << 20)])
def test_a_config_that_is_none(text: str, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(text, errors="surrogateescape")
    assert "adapter_config.json" in message_of(policy_of(adapter))[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "ADALORA"}, "only LoRA can be continued, and this is ADALORA"),
        ({"r": 513}, "its rank 513 is more than the 512"),
        ({"r": 4}, "has rank 4"),
        ({"r": "4"}, "has no rank"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save cannot be continued"),
        ({"use_dora": True}, "use_dora cannot be continued"),
        ({"use_rslora": True}, "use_rslora cannot be continued"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern cannot be continued"),
        ({"bias": "all"}, "its biases are trained too"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base too"),
    ],
)
def test_adapters_that_can_only_be_merged(values: dict[str, Any], message: str, adapter: Path) -> None:
    change(adapter, **values)
    where, found = message_of(policy_of(adapter, train_type="lora", adapter="continue"))
    assert where == "policy.model"
    assert message in found
    assert found.endswith("set policy.adapter: merge")
    assert find_origin(policy_of(adapter)).merged is not None


def test_only_an_adapter_can_be_continued_as_one(adapter: Path) -> None:
    for train_type in ("full", "adalora"):
        where, found = message_of(policy_of(adapter, train_type=train_type, adapter="continue"))
        assert (where, "set merge" in found) == ("policy.adapter", True)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 8}, "8, but the adapter that is continued has 3"),
        ({"alpha": 7.0}, "7, but"),
        ({"target_modules": ("q",)}, "of its own"),
    ],
)
def test_settings_that_contradict_the_continued_adapter(lora: dict[str, Any], message: str, adapter: Path) -> None:
    policy = policy_of(adapter, train_type="lora", adapter="continue", lora=LoraConfig(**lora))
    where, found = message_of(policy)
    assert where == f"policy.lora.{next(iter(lora))}"
    assert message in found
    same = LoraConfig(r=3, alpha=5.0)
    assert find_origin(policy.model_copy(update={"lora": same})).policy.lora == same


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        pytest.param(
            {"layers": 1, "hidden": 64},
            r"not an adapter of .*wrong, which has no model\.layers\.1\.",
            id="fewer layers",
        ),
        pytest.param(
            {"layers": 2, "hidden": 128},
            r"wrong, whose model\.layers\.0\.\S+ is \d+ × \d+, while its own lora_A is 3 × \d+",
            id="other sizes",
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused_before_anything_loads(
    sizes: dict[str, int], message: str, tmp_path: Path
) -> None:
    make_random_policy(tmp_path / "right", layers=2, hidden=64)
    make_random_policy(tmp_path / "wrong", **sizes)
    sft = make_adapter(tmp_path / "right", tmp_path / "sft")
    assert find_origin(policy_of(sft)).policy.model == str(tmp_path / "right")
    change(sft, base_model_name_or_path=str(tmp_path / "wrong"))
    with pytest.raises(UserError, match=message):
        find_origin(policy_of(sft))


def test_a_base_whose_files_name_layers_differently_is_left_to_loading(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """And one that is packed into 4 bits."""
    other = tmp_path / "other"
    shutil.copytree(base, other)
    change(adapter, base_model_name_or_path=str(other))
    weights = load_file(other / "model.safetensors")
    for renamed in (
        {f"transformer.{name}": tensor for name, tensor in weights.items()},
        {name: tensor.new_zeros(tensor.numel() // 2, 1, dtype=torch.uint8) for name, tensor in weights.items()},
    ):
        save_file(renamed, other / "model.safetensors", metadata={"format": "pt"})
        assert find_origin(policy_of(adapter)).policy.model == str(other)
