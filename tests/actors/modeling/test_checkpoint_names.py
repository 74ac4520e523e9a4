"""The names on the wire: those of the files that `save_pretrained` writes, of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.config import PolicyConfig
from actors.modeling.causal_lm import load_model
from actors.modeling.checkpoint_names import CheckpointNames
from tests.support.families import FAMILIES, make_family

pytestmark = pytest.mark.integration


def in_the_form_of_a_checkpoint(model: Any) -> dict[str, torch.Tensor]:
    form, parameters = CheckpointNames(model), dict(model.named_parameters())
    found: dict[str, torch.Tensor] = {}
    for names in form.together(parameters):
        converted = form.convert({name: parameters[name].detach() for name in names})
        outline = form.convert({name: parameters[name].detach().to("meta") for name in names})
        assert {n: (t.shape, t.dtype) for n, t in outline.items()} == {
            n: (t.shape, t.dtype) for n, t in converted.items()
        }
        assert list(outline) == list(converted)
        assert not found.keys() & converted.keys()
        found |= converted
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_has_the_tensors_of_its_file(tmp_path: Path, family: str) -> None:
    """Bit for bit; what is no parameter (a mixture's correction of its router) is not trained, and stays at home."""
    path = make_family(family, tmp_path)
    found = in_the_form_of_a_checkpoint(load_model(PolicyConfig(model=str(path), dtype="float32")))
    written = {n: t for n, t in load_file(path / "model.safetensors").items() if "e_score_correction_bias" not in n}
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(found[name], tensor), name


def test_the_experts_of_a_mixture_travel_one_by_one(tmp_path: Path) -> None:
    """Mixtral's published files: `block_sparse_moe.experts.<i>.w1` (gate), `w2` (down), `w3` (up)."""
    path = make_family("mixtral", tmp_path)
    model: Any = load_model(PolicyConfig(model=str(path), dtype="float32"))
    found, experts = in_the_form_of_a_checkpoint(model), model.model.layers[1].mlp.experts
    for index in range(4):
        gate, up = experts.gate_up_proj[index].detach().chunk(2)
        prefix = f"model.layers.1.block_sparse_moe.experts.{index}"
        assert torch.equal(found[f"{prefix}.w1.weight"], gate)
        assert torch.equal(found[f"{prefix}.w2.weight"], experts.down_proj[index].detach())
        assert torch.equal(found[f"{prefix}.w3.weight"], up)
