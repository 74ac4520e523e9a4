"""LoRA, QLoRA and AdaLoRA on real DeepSpeed ranks against a plain float64 loop over PEFT, two optimizer steps.

Of a kind that begins with `continued` the policy was an adapter before, which is trained on and is the reference.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from actors.config import LoraConfig
from actors.messages import LearnerSpec
from tests.support import tiny
from tests.support.learning import (
    FACTORS,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    Cut,
    Ranks,
    Trained,
    grpo,
    grpo_terms,
    learner_spec,
    make_samples,
    on_policy,
    sequence_logprobs,
    step,
    two_steps,
)
from tests.support.tiny_adapters import make_adapter
from trainers.adapter_folder import read_adapter

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),  # PEFT, of its own AdaLoRA
]

RATE = 40 * LEARNING_RATE  # an adapter begins at nothing
LORA = LoraConfig(r=4, alpha=8.0, init_r=5, target_r=2, tinit=0, tfinal=1)  # of 4 steps: ranks fall in each of two
CUTS = [Cut(1, 1, 1000, 0), Cut(2, 2, 40, 2), Cut(3, 2, 24, 3)]
CASES = [(kind, cut) for kind in ("lora", "qlora", "adalora") for cut in CUTS[1 if kind == "qlora" else 0 :]]
CASES += [
    ("adalora", Cut(3, 1, 1000, 0, on_ray=True))
]  # one micro-batch: the penalty's gradient is the second that ZeRO-3 sees
CASES += [("continued lora", cut) for cut in CUTS] + [("continued qlora", CUTS[2])]
SFT = "sft"  # folder of the adapter that is continued, in the policy's
INITIAL = "initial"  # folder of the adapter as it was made, in a training's


def spec(model: Path, kind: str, cut: Cut) -> LearnerSpec:
    made = learner_spec(model, grpo(), cut, rate=RATE, train_type=kind.removeprefix("continued "), lora=LORA)
    return (
        replace(made, adapter=read_adapter(model / SFT, where="policy.model")) if kind.startswith("continued") else made
    )


def plain_base(policy: Path, kind: str) -> Any:
    """The model below the adapter, in float64; for QLoRA the weights that transformers makes of its own 4-bit ones."""
    if not kind.endswith("qlora"):
        return tiny.load_plain(policy)
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32, quantization_config=quantized)
    return model.dequantize().double()


def plain_reference(policy: Path, kind: str) -> Any:
    """The policy as the run began."""
    base = plain_base(policy, kind)
    return peft.PeftModel.from_pretrained(base, policy / SFT).double().eval() if kind.startswith("continued") else base


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny.make_policy(tmp_path_factory.mktemp("policy"), tied=True)
    make_adapter(path, path / SFT)
    return path


def train(policy: Path, kind: str, cut: Cut, out: Path, ranks: Ranks) -> Trained:
    begun = plain_reference(policy, kind)
    samples = make_samples(begun, seed=1), on_policy(make_samples(begun, seed=2))
    with ranks.learners(spec(policy, kind, cut), cut, out) as group:
        tiny.run(group.export(str(out / INITIAL)))
        return two_steps(group, samples, cut, out)


@pytest.fixture(scope="module")
def trainings(policy: Path, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Cut], Trained]:
    return cache(lambda kind, cut: train(policy, kind, cut, tmp_path_factory.mktemp(f"{kind}-{cut}"), ranks))


def plain_steps(policy: Path, kind: str, trained: Trained) -> tuple[Any, list[float], list[float]]:
    """The same two steps by PEFT and torch alone, float64: model, losses, gradient norms."""
    initial = policy / SFT if kind.startswith("continued") else trained.out / INITIAL
    model: Any = peft.PeftModel.from_pretrained(plain_base(policy, kind), initial, is_trainable=True)
    model.double().eval()
    parameters = {name: p for name, p in model.named_parameters() if "lora_" in name}  # ranknum is a constant
    for name, p in model.named_parameters():
        p.requires_grad_(name in parameters)
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, weight_decay=WEIGHT_DECAY)
    losses, norms = [], []
    for number, (batch, factor) in enumerate(zip(trained.samples, FACTORS, strict=True), start=1):
        optimizer.param_groups[0]["lr"] = RATE * factor
        loss = grpo_terms(model, batch).mean()
        if kind == "adalora":
            loss = loss + 0.5 * penalty(parameters)  # PEFT's weight
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_GRAD_NORM)))
        optimizer.step()
        if kind == "adalora":
            model.base_model.update_and_allocate(number)
        optimizer.zero_grad()
    return model, losses, norms


def penalty(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean of ‖AAᵀ − I‖ and ‖BᵀB − I‖ over all layers (arXiv 2303.10512, eq. 4)."""
    found = []
    for name, p in parameters.items():
        if "lora_E" not in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            found.append((gram - torch.eye(len(gram), dtype=gram.dtype)).square().sum().sqrt())
    return torch.stack(found).mean()


@pytest.mark.parametrize(("kind", "cut"), CASES, ids=str)
def test_two_steps_are_those_of_the_plain_loop(
    kind: str, cut: Cut, policy: Path, trainings: Callable[[str, Cut], Trained]
) -> None:
    trained = trainings(kind, cut)
    model, losses, norms = plain_steps(policy, kind, trained)
    for k, report in enumerate(trained.reports):
        assert report.loss == pytest.approx(losses[k], rel=1e-5, abs=1e-6)
        assert report.grad_norm == pytest.approx(norms[k], rel=1e-5)
    reference = sequence_logprobs(plain_reference(policy, kind), trained.samples[0])
    for rows, now in ((trained.before, reference), (trained.after, sequence_logprobs(model, trained.samples[0]))):
        for row, logprobs, begun in zip(rows, now, reference, strict=True):
            np.testing.assert_allclose(row.old_logprobs, logprobs, rtol=0, atol=1e-4)
            np.testing.assert_allclose(row.ref_logprobs, begun, rtol=0, atol=1e-4)
    moved = max(float((a - b).abs().max()) for a, b in zip(now, reference, strict=True))
    assert moved > 0.001, "the comparison would prove nothing"


@pytest.mark.parametrize(("kind", "cut"), CASES, ids=str)
def test_what_is_exported_computes_the_same(
    kind: str, cut: Cut, policy: Path, trainings: Callable[[str, Cut], Trained]
) -> None:
    """In PEFT's own format; and AdaLoRA's as a plain adapter too, to 1e-5."""
    trained = trainings(kind, cut)
    folders = [trained.exported, *([trained.exported / "lora"] if kind == "adalora" else [])]
    for folder in folders:
        model = peft.PeftModel.from_pretrained(plain_base(policy, kind), folder).double()
        for row, logprobs in zip(trained.after, sequence_logprobs(model, trained.samples[0]), strict=True):
            np.testing.assert_allclose(row.old_logprobs, logprobs, rtol=0, atol=1e-5)
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(policy)
    assert not (trained.exported / "reference").exists()


@pytest.mark.parametrize(
    ("kind", "cut"), [("qlora", CUTS[2]), ("adalora", CUTS[1]), ("continued lora", CUTS[2])], ids=str
)
def test_a_loaded_checkpoint_continues_bit_for_bit(
    kind: str,
    cut: Cut,
    policy: Path,
    trainings: Callable[[str, Cut], Trained],
    ranks: Ranks,
    tmp_path: Path,
) -> None:
    trained = trainings(kind, cut)
    with ranks.learners(spec(policy, kind, cut), cut, tmp_path) as group:
        tiny.run(group.load(str(trained.checkpoint)))
        report = step(group, trained.samples[1], cut)
        tiny.run(group.export(str(tmp_path / "model")))
    assert report == trained.reports[1]
    again, before = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "model", trained.exported))
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in again)


@pytest.mark.parametrize("cut", [Cut(2, 1, 1000, 0), CUTS[2]], ids=str)
def test_the_masters_of_bfloat16_singular_values_stay_finer(
    cut: Cut, policy: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """What the ranks leave is not rounded: else steps below bfloat16's resolution would add up to nothing."""
    samples = make_samples(plain_base(policy, "adalora"), seed=1)
    made = learner_spec(policy, grpo(), cut, rate=RATE, train_type="adalora", lora=LORA, dtype="bfloat16")
    with ranks.learners(made, cut, tmp_path) as group:
        for seed in range(2):
            step(group, samples, cut, seed=seed)
        tiny.run(group.save(str(tmp_path)))
        tiny.run(group.export(str(tmp_path / "model")))
    masters = get_fp32_state_dict_from_zero_checkpoint(tmp_path, tag="learner", exclude_frozen_parameters=True)
    values = torch.cat([value.flatten() for name, value in masters.items() if "lora_E" in name])
    left = values[values != 0]
    assert len(left) == 28 + int(42 * (1 / 3) ** 3)  # as below
    assert float((left != left.bfloat16().float()).float().mean()) > 0.8
    served = load_file(tmp_path / "model" / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in served.values()} == {torch.bfloat16}


def test_ranks_fall_to_the_budget(trainings: Callable[[str, Cut], Trained]) -> None:
    """14 layers of rank 5; 3 steps to fall to 2 a layer: 28 + 42·(1 − k/3)³ of the 70 are left after step k."""
    trained = trainings("adalora", CUTS[0])
    for k, report in enumerate(trained.reports, start=1):
        budget = int(28 + 42 * (1 - k / 3) ** 3)
        assert report.metrics["adalora/rank_mean"].value == pytest.approx(budget / 14)
        assert report.metrics["adalora/budget"].value == budget
