"""AdaLoRA's ranks as `rlhf runs show` and the end of a run tell them, read from adapters that PEFT saved."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.runs.adalora_ranks import LayerRank, read_ranks
from cluster.runs.directory import RunDirectory
from trainers.config import Config
from trainers.tiny_models import make_random_policy

KEPT = {
    "model.layers.0.self_attn.q_proj.lora_E": [True, False, True],
    "model.layers.0.mlp.up_proj.lora_E": [True, True, True],
    "model.layers.2.self_attn.q_proj.lora_E": [False, True, False],
    "model.layers.11.self_attn.q_proj.lora_E": [False, False, False],
}


class _Train(Config):
    steps: int = 3


class _Run(Config):
    train: _Train = _Train()


def save_config(folder, **changes):
    config = peft.AdaLoraConfig(init_r=3, target_r=2, tinit=0, tfinal=1, total_step=9, rank_pattern=KEPT)
    config.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_each_layer_has_as_many_as_were_kept(tmp_path):
    save_config(tmp_path)
    table = read_ranks(tmp_path)
    assert (table.init_r, table.target_r) == (3, 2)
    assert set(table.layers) == {
        LayerRank(0, "self_attn.q_proj", 2),
        LayerRank(0, "mlp.up_proj", 3),
        LayerRank(2, "self_attn.q_proj", 1),
        LayerRank(11, "self_attn.q_proj", 0),
    }
    assert [line.split() for line in table.lines()] == [
        ["layer", "up_proj", "q_proj"],
        ["0", "3", "2"],
        ["2", "1"],
        ["11", "0"],
        ["mean", "1.5", "of", "3"],
    ]


def test_modules_of_one_name_are_told_apart(tmp_path):
    names = ("layers.0.self.out.lora_E", "layers.0.cross.out.lora_E", "head.lora_E")
    save_config(tmp_path, rank_pattern={name: [True] for name in names})
    head, first, alone, _ = read_ranks(tmp_path).lines()
    assert head.split() == ["layer", "self.out", "cross.out", "head"]
    assert (first.split(), alone.split()) == (["0", "1", "1"], ["1"])


@pytest.mark.parametrize("changes", [{"peft_type": "LORA"}, {"rank_pattern": None}, {"rank_pattern": {"a": 3}}])
def test_what_has_no_ranks_to_show(tmp_path, changes):
    save_config(tmp_path, **changes)
    assert read_ranks(tmp_path) is None
    assert read_ranks(tmp_path / "nothing") is None


def test_they_are_those_of_the_saved_tensors(tmp_path):
    """Of an adapter that PEFT itself trained and cut."""
    torch.manual_seed(0)
    make_random_policy(tmp_path / "policy")
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=4, target_r=2, tinit=0, tfinal=1, total_step=3, target_modules="all-linear"
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "policy"), config)
    for step in (1, 2):
        ids = torch.randint(3, 200, (2, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        model.base_model.update_and_allocate(step)
    model.save_pretrained(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
    found = read_ranks(tmp_path / "model").layers
    sizes = {name: len(tensor) for name, tensor in saved.items() if "lora_E" in name}
    assert len(found) == len(sizes)
    for each in found:
        assert sizes[f"base_model.model.model.layers.{each.layer}.{each.module}.lora_E"] == each.rank
    assert sum(each.rank for each in found) < 4 * len(found)


def test_runs_show_has_them(tmp_path):
    run = RunDirectory.create(tmp_path, "demo", _Run())
    run.model.mkdir()
    save_config(run.model)
    arguments = ["runs", "show", run.path.name, "--root", str(tmp_path)]
    shown = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["ranks"]
    assert {"layer": 0, "module": "mlp.up_proj", "rank": 3} in shown["layers"]
    assert "mean 1.5 of 3" in CliRunner().invoke(app, arguments).stdout
