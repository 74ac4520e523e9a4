"""`rlhf export`: tiny real models with adapters, merged, against the formula W + α/r·B·A in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from actors.modeling.causal_lm import load_model, load_policy, load_tokenizer
from actors.modeling.peft_adapters import save_adapter, trained_parameters
from actors.modeling.quantized import write_dequantized
from cluster.cli.main import app
from cluster.config.run import RunConfig, parse_config
from cluster.models.export import recorded_sequences, require_space
from cluster.runs.directory import RunDirectory
from cluster.runs.recorder import Recorder, RolloutRow
from trainers.errors import UserError
from trainers.tiny_models import make_random_policy

ADAPTERS = ["lora", "qlora", "adalora"]
LORA = {"r": 4, "alpha": 12.0, "init_r": 5, "target_r": 2}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def make_run(folder: Path, train_type: str, *, dtype: str = "float32", targets: Any = "all-linear") -> RunDirectory:
    """A run that is done, its adapter made by hand; the sixth and last step's rollouts are the newest."""
    make_random_policy(folder / "policy")
    tree = {
        "policy": {
            "model": str(folder / "policy"),
            "dtype": dtype,
            "train_type": train_type,
            "lora": LORA | {"target_modules": targets},
            "chat_template": TEMPLATE,
        },
        "data": {"prompts": "prompts.jsonl"},
        "rewards": [{"type": "function", "path": "rewards.py:score"}],
        "algorithm": {"type": "grpo"},
    }
    config = parse_config(tree)
    run = RunDirectory.create(folder / "runs", "demo", config)
    write_result(run, config)
    with Recorder(run.path) as recorder:
        for step in (2, 6):
            recorder.rollouts(step, [row(step, group, seed) for group in range(3) for seed in (0, 1)])
    run.update(state="succeeded", step=6)
    return run


def write_result(run: RunDirectory, config: RunConfig) -> None:
    """What the learners write: the adapter, its numbers drawn, and for QLoRA the base."""
    policy = config.policy
    module: Any = load_policy(policy, total_steps=60)
    load_tokenizer(policy).save_pretrained(run.model)
    if policy.train_type == "full":
        module.save_pretrained(run.model)
        return
    draw = torch.Generator().manual_seed(1)
    tensors = {n: 0.1 * torch.randn(p.shape, generator=draw).to(p.dtype) for n, p in trained_parameters(module)}
    save_adapter(module, tensors, run.model, policy)
    if policy.train_type == "qlora":
        write_dequantized(module, load_model(policy), run.base)


def row(step: int, group: int, seed: int) -> RolloutRow:
    tokens = np.random.default_rng([step, group, seed]).integers(3, 250, 12).astype(np.int32)
    return RolloutRow(
        step=step,
        sample_id=f"{group}/{seed}",
        group=group,
        prompt="[]",
        completion="",
        prompt_tokens=tokens[:5],
        tokens=tokens[5:],
        logprobs=np.zeros(7, np.float32),
        rewards={},
        reward=0.0,
        valid=True,
        advantage=0.0,
        policy_version=0,
        finish_reason="stop",
    )


def plain(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()


def adapter_of(run: RunDirectory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(A, α/r·B) of each adapted layer, by its name in the model, float64."""
    folder = run.model / "lora" if (run.model / "lora").is_dir() else run.model
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {name: t.double() for name, t in load_file(folder / "adapter_model.safetensors").items()}
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            a,
            config["lora_alpha"] / config["r"] * tensors[name.replace("lora_A", "lora_B")],
        )
        for name, a in tensors.items()
        if "lora_A" in name
    }


def with_adapter(model: Any, run: RunDirectory) -> Any:
    """The adapter beside its base, by hooks."""
    for name, (a, b) in adapter_of(run).items():
        model.get_submodule(name).register_forward_hook(lambda _, x, y, a=a, b=b: y + x[0] @ a.T @ b.T)
    return model


@torch.no_grad()
def logits(model: Any, run: RunDirectory) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor(ids)[None].long()).logits[0] for ids in recorded_sequences(run)]


def chosen(model: Any, run: RunDirectory) -> torch.Tensor:
    """Log-probabilities of all recorded tokens but the first of each sample."""
    found = []
    for ids, row in zip(recorded_sequences(run), logits(model, run), strict=True):
        found.append(row.log_softmax(-1)[:-1].gather(1, torch.tensor(ids)[1:, None].long())[:, 0])
    return torch.cat(found)


def export(run: RunDirectory, target: Path) -> Any:
    return CliRunner().invoke(app, ["export", str(run.path), "--merged", str(target)])


def base_of(run: RunDirectory) -> Path:
    return run.base if run.base.is_dir() else Path(run.config()["policy"]["model"])


@pytest.mark.parametrize("train_type", ADAPTERS)
def test_the_merged_model_is_base_and_adapter_in_one(train_type: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, train_type)
    target = tmp_path / "out" / "merged"
    result = export(run, target)
    assert result.exit_code == 0, result.output
    expected = plain(base_of(run))
    before = logits(expected, run)
    with torch.no_grad():
        for name, (a, b) in adapter_of(run).items():
            expected.get_submodule(name).weight += b @ a
    for now, wanted, then in zip(logits(plain(target), run), logits(expected, run), before, strict=True):
        torch.testing.assert_close(now, wanted, rtol=0, atol=1e-5)
        assert float((wanted - then).abs().max()) > 0.1, "the comparison tells nothing"
    assert not list(target.glob("adapter*"))
    assert AutoTokenizer.from_pretrained(target).chat_template == TEMPLATE
    told = json.loads((target / "export.json").read_text())
    assert (told["run"], told["base"], told["samples"], told["tokens"]) == (run.path.name, str(base_of(run)), 3, 33)
    assert told["logprob_error_mean"] <= told["logprob_error_max"] < 1e-5


def test_the_error_is_that_of_rounding_the_weights(tmp_path: Path) -> None:
    """In bfloat16: base and adapter apart, by hooks in float64, against what was written."""
    run = make_run(tmp_path, "lora", dtype="bfloat16")
    result = export(run, tmp_path / "merged")
    assert result.exit_code == 0, result.output
    base = load_model(parse_config(run.config()).policy).double().eval()  # rounded, as it was trained with
    gap = (chosen(plain(tmp_path / "merged"), run) - chosen(with_adapter(base, run), run)).abs()
    told = json.loads((tmp_path / "merged" / "export.json").read_text())
    assert told["logprob_error_max"] == pytest.approx(float(gap.max()), rel=1e-2)
    assert told["logprob_error_mean"] == pytest.approx(float(gap.mean()), rel=1e-2)
    assert f"{told['logprob_error_max']:.3g} at most" in result.output
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_head_that_shares_the_embedding_leaves_it_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path, "lora", targets=["lm_head", "q_proj"])
    result = export(run, tmp_path / "merged")
    assert result.exit_code == 0, result.output
    expected = with_adapter(plain(base_of(run)), run)
    torch.testing.assert_close(chosen(plain(tmp_path / "merged"), run), chosen(expected, run), rtol=0, atol=1e-5)


def test_without_rollouts_nothing_is_claimed(tmp_path: Path) -> None:
    run = make_run(tmp_path, "lora")
    for file in run.rollouts.iterdir():
        file.unlink()
    (tmp_path / "merged").mkdir()  # empty: fine
    result = export(run, tmp_path / "merged")
    assert (result.exit_code, "not measured" in result.output) == (0, True)
    assert json.loads((tmp_path / "merged" / "export.json").read_text())["logprob_error_max"] is None


def test_it_is_measured_on_one_sample_of_each_group_of_the_last_step(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with Recorder(run.path) as recorder:
        for step in (999_999, 1_000_000):
            recorder.rollouts(step, [row(step, group, seed) for group in (4, 2) for seed in (0, 1)])
    expected = [np.random.default_rng([1_000_000, group, 0]).integers(3, 250, 12) for group in (4, 2)]
    assert {tuple(found) for found in recorded_sequences(run)} == {tuple(ids) for ids in expected}


# --- refused


def refused(run: RunDirectory, target: Path, *parts: str) -> None:
    before = sorted(target.parent.rglob("*"))
    result = export(run, target)
    assert result.exit_code == 2, result.output
    for part in parts:
        assert part in result.stderr
    assert sorted(target.parent.rglob("*")) == before


def test_what_is_not_merged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "full", "full")
    refused(run, tmp_path / "merged", "trained in full", str(run.model))
    run = make_run(tmp_path / "qlora", "qlora")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    refused(run, tmp_path / "used", "in use")
    refused(run, tmp_path / "used" / "file", "in use")
    run.base.rename(run.path / "elsewhere")
    refused(run, tmp_path / "merged", str(run.base), "is gone")
    run.update(state="stopped", step=4)
    refused(run, tmp_path / "merged", "is stopped after step 4")


def test_a_damaged_adapter_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path, "lora")
    (run.model / "adapter_model.safetensors").write_bytes(b"x")
    refused(run, tmp_path / "merged", "could not be merged")


def test_a_full_disk(tmp_path: Path) -> None:
    require_space(tmp_path / "new", 1)
    with pytest.raises(UserError, match="too little space"):
        require_space(tmp_path / "new", 1_000 * 2**40)


def test_a_run_is_named_by_its_id_too(tmp_path: Path) -> None:
    run = make_run(tmp_path, "full")
    arguments = ["export", run.path.name, "--root", str(run.path.parent), "--merged", str(tmp_path / "merged")]
    assert "trained in full" in CliRunner().invoke(app, arguments).stderr
    assert CliRunner().invoke(app, ["export", "nothing", *arguments[2:]]).exit_code == 2
    assert CliRunner().invoke(app, ["export", str(run.path)]).exit_code == 2
