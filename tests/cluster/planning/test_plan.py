"""The plan: arithmetic in words, memory by hand, and every problem found in real files."""

import io
import json
import subprocess
import sys

import peft
import pytest
import torch
import yaml
from rich.console import Console
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.config.run import parse_config
from cluster.models.inspect import ModelInfo, read_model
from cluster.planning.memory import generator_memory, kv_bytes_per_token, learner_memory
from cluster.planning.plan import as_json, batch_arithmetic, find_problems, make_plan, render
from tests.support.families import make_family
from trainers.errors import UserError
from trainers.tiny_models import make_tokenizer

LAYERS, HIDDEN, HEADS, HEAD_DIM, CONTEXT = 2, 64, 2, 32, 128


def save(folder, kind=Qwen3ForCausalLM, *, tokenizer=None, **changes):
    tokenizer = tokenizer or make_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        **{"max_position_embeddings": CONTEXT, "pad_token_id": tokenizer.pad_token_id, **changes},
    )
    model = kind(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    save(folder)
    return folder


@pytest.fixture
def make(policy, tmp_path):
    """A sound config on real files, with changes; `prompts` are the lines of its file."""

    def build(prompts=('{"prompt": "37+48="}', '{"prompt": "1+2="}'), **changes):
        (tmp_path / "prompts.jsonl").write_text("".join(f"{line}\n" for line in prompts))
        (tmp_path / "rule.py").write_text("def score(*, prompt, completion, **columns):\n    return 1.0\n")
        tree = {
            "root": str(tmp_path / "runs"),
            "policy": {"model": str(policy), "dtype": "float32"},
            "data": {"prompts": str(tmp_path / "prompts.jsonl"), "max_prompt_tokens": 64},
            "rewards": [{"type": "function", "path": f"{tmp_path / 'rule.py'}:score"}],
            "algorithm": {"type": "grpo"},
            "sampling": {"max_tokens": 16, "n": 4},
            "train": {"prompts_per_step": 2, "steps": 3},
        }
        for key, value in changes.items():
            tree[key] = {**tree[key], **value} if isinstance(tree.get(key), dict) else value
        return parse_config(tree)

    return build


def problems(config):
    return {p.where: p.message for p in find_problems(config)}


def test_a_sound_run_has_no_problems(make):
    plan = make_plan(make(), gpus=False)
    assert plan.problems == ()
    assert [role.name for role in plan.roles][:3] == ["driver", "generator", "learner"]


# --- arithmetic


def test_the_arithmetic_of_an_on_policy_run(make):
    lines = batch_arithmetic(make(train={"prompts_per_step": 32, "steps": 100}, sampling={"n": 8}), prompts=2000)
    assert lines[0] == "32 prompts × 8 completions = 256 samples a step"
    assert lines[1] == "1 update of 256 samples a step: exactly on-policy"
    assert (
        "1 rank, in micro-batches of at most 8192 tokens with padding (102 of the longest samples of 64 + 16 = 80"
        in lines[2]
    )
    assert lines[3].startswith("at most 4096 tokens generated a step")
    assert lines[4] == "100 steps see 3200 prompts = 1.6 epochs of 2000"
    assert lines[5] == "100 steps × 1 = 100 optimizer steps in all"


def test_the_arithmetic_of_several_updates(make):
    train = {"prompts_per_step": 5, "updates_per_step": 3, "epochs_per_step": 2, "steps": 10}
    lines = batch_arithmetic(make(train=train, data={"eval_prompts": "e.jsonl"}), prompts=None)
    assert lines[1].startswith("2 passes × 3 updates = 6 updates a step, each of 6 or 7 samples")
    assert lines[4] == "10 steps see 50 prompts"
    assert lines[5] == "10 steps × 6 = 60 optimizer steps in all"
    assert lines[6] == "evaluation with 4 completions a prompt: before, every 10 steps, and after"


# --- memory

MODEL = ModelInfo(
    name="m",
    config={
        "num_hidden_layers": 10, "hidden_size": 100, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 50, "vocab_size": 1000, "max_position_embeddings": 4096,
    },
    parameters=1_000_000,
)  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [
        (0, 2_000_000, 4_000_000, 12_000_000),
        (1, 2_000_000, 4_000_000, 3_000_000),
        (2, 2_000_000, 1_000_000, 3_000_000),
        (3, 500_000, 1_000_000, 3_000_000),
    ],
)
def test_zero_divides_by_the_ranks_what_its_stage_shards(make, stage, weights, gradients, optimizer):
    config = make(policy={"dtype": "bfloat16"}, learners={"zero_stage": stage, "workers": 4})
    found = learner_memory(config, MODEL)
    assert found.device == {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "reference": weights,
        "activations": 17 * 2 * 8192 * 100 * 10,
        "logits": 2 * 2 * 8192 * 1000,
    }
    assert found.host == {}


def test_offload_moves_to_the_host_and_checkpointing_keeps_one_layer(make):
    learners = {"zero_stage": 3, "offload": "all", "workers": 2, "gradient_checkpointing": True}
    found = learner_memory(make(learners=learners, policy={"dtype": "bfloat16"}), MODEL)
    assert found.host == {"optimizer": 6_000_000, "weights": 1_000_000, "reference": 1_000_000}
    assert found.device["activations"] == 2 * 8192 * 100 * (10 + 17)
    assert set(found.device) == {"gradients", "activations", "logits"}


def test_without_a_kl_term_there_is_no_reference(make):
    assert "reference" not in learner_memory(make(algorithm={"kl": {"coef": 0}}), MODEL).device


def test_the_generators_cache(make):
    config = make(policy={"dtype": "bfloat16"}, generators={"tensor_parallel": 2}, train={"prompts_per_step": 8})
    assert kv_bytes_per_token(config, MODEL) == 2 * 10 * (2 * 50) * 2
    found = generator_memory(config, MODEL, gpus=True)
    assert found.device == {"weights": 1_000_000, "kv_cache": 4000 * (64 + 16) * 32 // 2}
    assert generator_memory(make(), MODEL, gpus=False).device == {"weights": 4_000_000, "kv_cache": 2**30}


# --- models


def test_sizes_are_those_of_the_saved_model(tmp_path):
    parameters = save(tmp_path, tie_word_embeddings=False)
    info = read_model(str(tmp_path), where="policy.model")
    assert (info.parameters, info.layers, info.hidden, info.context) == (parameters, LAYERS, HIDDEN, CONTEXT)
    assert info.kv_width == HEAD_DIM


def test_a_model_of_several_files_is_counted_whole(tmp_path, policy):
    model = Qwen3ForCausalLM.from_pretrained(policy)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert read_model(str(tmp_path), where="m").parameters == sum(p.numel() for p in model.parameters())


def test_what_is_no_causal_language_model_is_named(tmp_path):
    save(tmp_path, Qwen3ForSequenceClassification)
    with pytest.raises(UserError, match="is a Qwen3ForSequenceClassification, not a causal language model"):
        read_model(str(tmp_path), where="policy.model")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no config.json"),
        ({"config.json": "{"}, "cannot be read"),
        ({"config.json": "[]"}, "does not hold a JSON object"),
        ({"config.json": '{"model_type": "vit"}'}, "is a model of type vit, not a causal"),
        ({"config.json": '{"architectures": ["Qwen3ForCausalLM"]}'}, "has no weights"),
        ({"adapter_config.json": "{}"}, "is a PEFT adapter"),
        (
            {"config.json": '{"architectures": ["Qwen3ForCausalLM"]}', "model.safetensors": "x"},
            "is not a complete safetensors file",
        ),
    ],
)
def test_folders_that_are_no_model(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_model(str(tmp_path), where="policy.model")
    assert error.value.problems[0].where == "policy.model"


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(UserError, match="no such folder: /nowhere/model"):
        read_model("/nowhere/model", where="policy.model")
    with pytest.raises(UserError, match="no such folder, and no model of that name on the hub"):
        read_model("nobody/nothing-of-that-name", where="policy.model")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        read_model(str(tmp_path / "file"), where="policy.model")


def test_an_adapter_on_a_mixture_needs_gpus(make, tmp_path):
    mixture = str(make_family("mixtral", tmp_path / "mixture"))
    config = make(policy={"model": mixture, "train_type": "lora"})
    (found,) = make_plan(config, gpus=False).problems
    assert (found.where, "is a mixture of experts (mixtral)" in found.message) == ("policy.train_type", True)
    assert make_plan(config, gpus=True).problems == ()
    assert find_problems(config) == []  # asked before it is known where the generators run
    assert make_plan(make(policy={"model": mixture}), gpus=False).problems == ()


# --- problems


def test_every_problem_comes_at_once(make):
    config = make(
        prompts=['{"prompt": "1+2="}', "nonsense"],
        policy={"model": "/nowhere/model"},
        sampling={"n": 1},
        rewards=[{"type": "function", "path": "/nowhere/rule.py:score"}],
    )
    found = problems(config)
    assert {"policy.model", "sampling.n"} <= set(found)
    assert any(where.endswith("prompts.jsonl:2") for where in found)
    assert any(where.startswith("rewards.0") for where in found)


def test_more_tokens_than_the_context_holds(make):
    (message,) = problems(make(data={"max_prompt_tokens": 113})).values()
    assert "129 tokens in all, but the model's context has 128" in message


def test_a_prompt_longer_than_the_limit_is_named_by_its_line(make):
    config = make(prompts=['{"prompt": "1+2="}', json.dumps({"prompt": "1" * 100})])
    ((where, message),) = problems(config).items()
    assert where.endswith("prompts.jsonl:2")
    assert "at most 64" in message
    filtered = make_plan(
        make(prompts=['{"prompt": "1+2="}', json.dumps({"prompt": "1" * 100})], data={"overlong": "filter"}), gpus=False
    )
    assert filtered.problems == ()
    assert "= 6 epochs of 1" in filtered.arithmetic[4]


def test_messages_need_a_chat_template(make, tmp_path):
    bare = make_tokenizer()
    bare.chat_template = None
    save(tmp_path / "bare", tokenizer=bare)
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+2="}]
    lines = [json.dumps({"messages": messages})]
    ((where, message),) = problems(make(prompts=lines, policy={"model": str(tmp_path / "bare")})).items()
    assert where.endswith("prompts.jsonl:1")
    assert "without a chat template" in message
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert problems(make(prompts=lines, policy={"model": str(tmp_path / "bare"), "chat_template": template})) == {}


@pytest.mark.parametrize(("text", "message"), [("", "empty"), (None, "no such file")])
def test_prompt_files_that_are_empty_or_missing(make, tmp_path, text, message):
    config = make(data={"prompts": str(tmp_path / "other.jsonl")})
    if text is not None:
        (tmp_path / "other.jsonl").write_text(text)
    assert any(message in f"{where} {what}".lower() for where, what in problems(config).items())


def test_problems_of_the_evaluation_prompts_count_too(make, tmp_path):
    (tmp_path / "eval.jsonl").write_text("nonsense\n")
    assert any("eval.jsonl:1" in where for where in problems(make(data={"eval_prompts": str(tmp_path / "eval.jsonl")})))


# --- shown


def test_the_plan_as_text_and_as_json(make):
    plan = make_plan(make(sampling={"n": 1}, train={"max_grad_norm": 10}), gpus=False)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(plan))
    text = console.export_text()
    for part in (
        "2 prompts × 1 completion = 2 samples a step",
        "learner",
        "rough estimate",
        "Problems (1)",
        "Warnings (2)",
        "train.max_grad_norm: 10 is far from the usual 0.1 to 1",
        "\nseed: 0",
    ):
        assert part in text
    value = json.loads(json.dumps(as_json(plan)))
    assert text.index("Problems (1)") < text.index("Warnings (2)")
    assert value["problems"][0]["path"] == "sampling.n"
    assert [warning["path"] for warning in value["warnings"]] == ["train.max_grad_norm", "data.eval_prompts"]
    assert parse_config(value["config"]) == plan.config


def test_warnings_stop_nothing_and_know_the_models_size(make):
    """The model has some hundred thousand parameters, for which no learning rate is said to be high."""
    config = make(train={"learning_rate": 1e-3})
    assert problems(config) == {}
    assert [warning.where for warning in make_plan(config, gpus=False).warnings] == ["data.eval_prompts"]


@pytest.mark.integration  # imports transformers in a process: seconds
def test_standard_output_is_json_and_nothing_else(make, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(make().model_dump(mode="json")))
    command = "from cluster.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "plan", tmp_path / "run.yaml", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["problems"] == []


def test_on_gpus_each_learner_has_one(make):
    plan = make_plan(make(generators={"tensor_parallel": 2, "replicas": 3}, learners={"workers": 4}), gpus=True)
    roles = {role.name: (role.count, role.gpus) for role in plan.roles}
    assert (roles["generator"], roles["learner"]) == ((3, 2), (4, 1))


def test_the_module_itself_loads_no_engine():
    code = "import sys, cluster.planning.plan; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# --- the other algorithms and train types


def test_an_adapter_costs_little_and_needs_no_reference(make):
    """23·100·8 numbers in each of ten layers: 184,000 are trained, of a million."""
    config = make(policy={"train_type": "lora", "lora": {"r": 8}}, learners={"zero_stage": 1, "workers": 2})
    found = learner_memory(config, MODEL)
    assert found.device["gradients"] == 4 * 184_000
    assert found.device["optimizer"] == 12 * 184_000 // 2
    assert found.device["weights"] == 4 * 1_000_000
    assert "reference" not in found.device
    assert learner_memory(make(policy={"train_type": "qlora"}), MODEL).device["weights"] == 500_000


def test_a_critic_is_trained_whole(make):
    """Weights, gradients, optimizer over two ranks at stage 2: 4·P + 4·P/2 + 12·P/2."""
    config = make(algorithm={"type": "ppo"}, learners={"zero_stage": 2, "workers": 2})
    assert learner_memory(config, MODEL).device["critic"] == 12_000_000
    config = make(algorithm={"type": "ppo"}, learners={"zero_stage": 3, "workers": 2, "offload": "all"})
    found = learner_memory(config, MODEL)  # 4·P/2 of gradients here, 4·P/2 + 12·P/2 there
    assert (found.device["critic"], found.host["critic"]) == (2_000_000, 8_000_000)


@pytest.mark.parametrize(("train_type", "weights"), [("lora", 4_000_000), ("qlora", 500_000)])
def test_a_critic_with_an_adapter(make, train_type, weights):
    """184,000 numbers of the adapter of rank 8 and 100 of the head are trained, whatever the policy's train type."""
    algorithm = {"type": "ppo", "critic": {"train_type": train_type}}
    learners = {"zero_stage": 1, "workers": 2}
    for policy in ({"lora": {"r": 8}}, {"train_type": "adalora", "lora": {"r": 8, "init_r": 3, "target_r": 2}}):
        found = learner_memory(make(algorithm=algorithm, learners=learners, policy=policy), MODEL)
        assert found.device["critic"] == weights + 4 * 184_100 + 12 * 184_100 // 2


def test_a_teacher_must_have_the_policys_vocabulary(make, tmp_path, policy):
    teacher = {"type": "gkd", "teacher": {"model": str(policy)}}
    assert problems(make(algorithm=teacher)) == {}
    other = make_tokenizer()
    other.add_tokens(["zebra"])
    save(tmp_path / "other", tokenizer=other)
    found = problems(make(algorithm={"type": "gkd", "teacher": {"model": str(tmp_path / "other")}}))
    assert "1 tokens differ, such as 'zebra'" in found["algorithm.teacher.model"]
    assert (
        "no such folder"
        in problems(make(algorithm={"type": "gkd", "teacher": {"model": "/none"}}))["algorithm.teacher.model"]
    )


def test_a_teacher_reads_what_the_policy_writes(make, tmp_path, policy):
    save(tmp_path / "short", max_position_embeddings=40)
    found = problems(make(algorithm={"type": "gkd", "teacher": {"model": str(tmp_path / "short")}}))
    assert "its context has 40 tokens, but a prompt with its completion may have 80" in found["algorithm.teacher.model"]


def test_a_held_teacher_takes_memory(make, tmp_path, policy):
    """A float32 copy on each of two ranks, or half of one under ZeRO-3; none where an engine serves it."""
    parameters = read_model(str(policy), where="policy.model").parameters
    gkd = {"type": "gkd", "teacher": {"model": str(policy)}, "lmbda": 1.0}

    def teacher(stage, **changes):
        config = make(algorithm=gkd | changes, learners={"zero_stage": stage, "workers": 2})
        (learner,) = [estimate for estimate in make_plan(config, gpus=True).memory if estimate.role == "learner"]
        return learner.device.get("teacher")

    assert (teacher(2), teacher(3)) == (4 * parameters, 2 * parameters)
    assert teacher(2, top_k=8, teacher={"model": str(policy), "served": True}) is None


def test_gkds_data_must_hold_what_it_learns_from(make, policy):
    gkd = {"type": "gkd", "teacher": {"model": str(policy)}}
    whole = '{"prompt": "1+2=", "response": "3"}'
    lines = (whole, '{"prompt": "2+2="}', '{"prompt": "3+2="}', whole)
    found = problems(make(prompts=lines, algorithm=gkd, data={"strip_responses": True}))
    ((where, message),) = found.items()
    assert where.endswith("prompts.jsonl:2")
    assert "holds no response, nor do 1 other record; gkd learns" in message
    assert problems(make(prompts=(whole,), algorithm=gkd, data={"strip_responses": True})) == {}
    assert problems(make(prompts=lines, algorithm=gkd | {"lmbda": 1.0}, data={"strip_responses": True})) == {}


def test_a_teacher_that_writes_has_an_engine_of_its_own(make, policy):
    teacher = {"type": "gkd", "teacher": {"model": str(policy)}}
    config = make(algorithm=teacher, generators={"tensor_parallel": 2})
    (role,) = [role for role in make_plan(config, gpus=True).roles if role.name.startswith("teacher")]
    assert (role.count, role.gpus, role.cpus) == (1, 2, 1)
    alone = make(algorithm={**teacher, "lmbda": 1.0})
    assert not [role for role in make_plan(alone, gpus=True).roles if role.name.startswith("teacher")]


def test_a_critic_is_made_of_a_model(make, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "has no config.json"), ("none", "no such folder")):
        found = problems(make(algorithm={"type": "ppo", "critic": {"model": str(tmp_path / folder)}}))
        assert message in found["algorithm.critic.model"]


def test_a_critic_reads_the_policys_tokens(make, tmp_path, policy):
    assert problems(make(algorithm={"type": "ppo", "critic": {"model": str(policy)}})) == {}
    other = make_tokenizer()
    other.add_tokens(["zebra"])
    save(tmp_path / "other", tokenizer=other)
    save(tmp_path / "short", max_position_embeddings=40)
    for folder, message in (("other", "1 tokens differ, such as 'zebra'"), ("short", "its context has 40 tokens")):
        found = problems(make(algorithm={"type": "ppo", "critic": {"model": str(tmp_path / folder)}}))
        assert message in found["algorithm.critic.model"]


def test_an_adapter_must_have_layers_to_stand_on(make):
    assert problems(make(policy={"train_type": "lora", "lora": {"target_modules": ["q_proj", "up_proj"]}})) == {}
    found = problems(make(policy={"train_type": "lora", "lora": {"target_modules": ["q_proj", "query"]}}))
    assert "no linear layer of the model is called query; there are down_proj, " in found["policy.lora.target_modules"]


@pytest.mark.parametrize("name", ["q_norm", "embed_tokens"])
def test_an_adapter_stands_on_linear_layers_only(make, name):
    found = problems(make(policy={"train_type": "adalora", "lora": {"target_modules": [name]}, "dtype": "float32"}))
    message = f"no linear layer of the model is called {name}; there are down_proj, gate_proj, "
    assert message in found["policy.lora.target_modules"]


def test_a_critics_adapter_too(make):
    policy = {"lora": {"target_modules": ["query"]}}
    assert problems(make(policy=policy, algorithm={"type": "ppo"})) == {}
    found = problems(make(policy=policy, algorithm={"type": "ppo", "critic": {"train_type": "qlora"}}))
    assert "no linear layer of the critic's model is called query" in found["policy.lora.target_modules"]


def test_a_served_teacher_tells_no_more_tokens_than_there_are(make, policy):
    teacher = {"model": str(policy), "served": True}
    vocabulary = len(make_tokenizer())
    assert problems(make(algorithm={"type": "gkd", "teacher": teacher, "top_k": vocabulary})) == {}
    found = problems(make(algorithm={"type": "gkd", "teacher": teacher, "top_k": vocabulary + 1}))
    assert f"{vocabulary + 1}, but the teacher's vocabulary has {vocabulary} tokens" in found["algorithm.top_k"]


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"policy": {"train_type": "qlora"}}, "policy.train_type"),
        ({"algorithm": {"type": "ppo", "critic": {"train_type": "qlora"}}}, "algorithm.critic.train_type"),
    ],
)
def test_qlora_needs_bitsandbytes_for_the_device(make, monkeypatch, changes, where):
    import bitsandbytes

    assert problems(make(**changes)) == {}
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"hpu"})
    assert "has 4-bit weights on hpu, not on this machine's" in problems(make(**changes))[where]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "cannot be loaded here" in problems(make(**changes))[where]


# --- a policy that is an adapter


@pytest.fixture
def adapter(policy, tmp_path):
    """LoRA of rank 3 as PEFT saves it."""
    model = peft.get_peft_model(
        Qwen3ForCausalLM.from_pretrained(policy), peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


def test_an_adapter_is_planned_as_what_it_stands_on(make, adapter, policy):
    """Sizes, context, layers and template are the base's; a continued one has its own rank."""
    plan = make_plan(make(policy={"model": str(adapter)}), gpus=False)
    assert plan.problems == ()
    assert plan.memory == make_plan(make(), gpus=False).memory
    found = problems(make(policy={"model": str(adapter)}, data={"max_prompt_tokens": 113}))
    assert "the model's context has 128" in found["data.max_prompt_tokens"]
    lora = {"train_type": "lora", "lora": {"target_modules": ["query"]}}
    assert "no linear layer" in problems(make(policy={"model": str(adapter), **lora}))["policy.lora.target_modules"]
    config = make(policy={"model": str(adapter), "adapter": "continue", "train_type": "lora"})
    (_, learner) = make_plan(config, gpus=False).memory
    assert learner.device["gradients"] == 4 * 23 * HIDDEN * 3 * LAYERS
    teacher = {"type": "gkd", "teacher": {"model": str(policy)}}
    assert problems(make(policy={"model": str(adapter)}, algorithm=teacher)) == {}


def test_the_adapters_own_template_renders_the_prompts(make, adapter):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no prompt is good enough') }}"
    tokenizer.save_pretrained(adapter)
    ((where, message),) = problems(make(prompts=['{"prompt": "1+2="}'], policy={"model": str(adapter)})).items()
    assert where.endswith("prompts.jsonl:1")
    assert "no prompt is good enough" in message


def test_an_adapter_must_be_usable_as_wished(make, adapter, tmp_path):
    for train_type in ("full", "adalora"):
        config = make(policy={"model": str(adapter), "adapter": "continue", "train_type": train_type})
        assert "set merge, or lora" in problems(config)["policy.adapter"]
    file = adapter / "adapter_config.json"
    base = tmp_path / "base"
    base.mkdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "../base"}))
    assert f"{base} has no config.json" in problems(make(policy={"model": str(adapter)}))["policy.model"]
    base.rmdir()
    assert "is not here: ../base" in problems(make(policy={"model": str(adapter)}))["policy.model"]


def test_critic_and_teacher_are_whole_models(make, adapter):
    for algorithm, where in (
        ({"type": "ppo", "critic": {"model": str(adapter)}}, "algorithm.critic.model"),
        ({"type": "gkd", "teacher": {"model": str(adapter)}}, "algorithm.teacher.model"),
    ):
        assert "is a PEFT adapter, not a complete model; merge it" in problems(make(algorithm=algorithm))[where]
    config = make(
        policy={"model": str(adapter), "adapter": "continue", "train_type": "lora"},
        algorithm={"type": "ppo", "critic": {"train_type": "qlora"}},
    )
    assert "cannot be quantized" in problems(config)["algorithm.critic.train_type"]


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_the_command_refuses_an_adapter_without_its_base(verb, make, adapter, tmp_path):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/nowhere/base"}))
    config = make(policy={"model": str(adapter)})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    done = CliRunner().invoke(app, [verb, str(tmp_path / "run.yaml")])
    assert done.exit_code == 2, done.output
    assert "policy.model: the base of" in done.output.replace("\n", " ")
