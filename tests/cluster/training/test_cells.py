"""The twelve cells, whole, on the arithmetic example: each learns past a gate, proved after every sync, and loadable.

GRPO and PPO must get more held-out sums right, from the learned reward model alone; GKD must come nearer its teacher.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from benchmarks.matrix import CELLS, Cell, prepare, run_cell
from cluster.cli.demo import MODELS
from cluster.runs.adalora_ranks import read_ranks
from tests.support.greedy_answers import greedy_answers
from tests.support.recorded import adapter_bytes, recorded_gap

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),  # PEFT, of its own AdaLoRA
]

STEPS = 16
OTHERS_WRITE = ("gkd-lora", "gkd-adalora")  # the teacher, and the data; else the policy, in half of GKD's steps


class Cells:
    """The cells' runs, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._done: dict[str, Cell] = {}

    def __getitem__(self, name: str) -> Cell:
        if name not in self._done:
            self._done[name] = run_cell(name, self._root, steps=STEPS, more=self._more(name))
        return self._done[name]

    def _more(self, name: str) -> list[str]:
        if name == "ppo-lora":
            return ["algorithm.critic.warmup_steps=1"]
        if name != "gkd-adalora":
            return []
        answered = self._root / "answered.jsonl"
        prompts = [json.loads(line)["prompt"] for line in (MODELS / "prompts.jsonl").read_text().splitlines()]
        answered.write_text("".join(json.dumps({"prompt": p, "response": right(p)}) + "\n" for p in prompts))
        return ["algorithm.lmbda=0", f"data.prompts={answered}", "data.strip_responses=true"]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    prepare()
    return Cells(tmp_path_factory.mktemp("cells"))


def right(prompt: str) -> str:
    first, second = prompt.rstrip("=").split("+")
    return str(int(first) + int(second))


def result(cell: Cell) -> tuple[str, str, str]:
    """The base (or the whole model), and what was trained as PEFT and as vLLM load it."""
    model = cell.run / "model"
    if cell.train_type == "full":
        return str(model), "", ""
    base = cell.run / "base" if cell.train_type == "qlora" else MODELS / "policy"
    return str(base), str(model), str(model / "lora" if cell.train_type == "adalora" else model)


def saved(cell: Cell) -> Any:
    """The result as transformers and PEFT load it."""
    base, adapter, _ = result(cell)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, adapter) if adapter else model


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_learns(name: str, cells: Cells) -> None:
    cell = cells[name]
    before, after = cell.evaluations
    if name.startswith("gkd"):
        assert cell.metrics[-1]["distill/jsd"] < 0.6 * cell.metrics[0]["distill/jsd"]
    else:
        assert after["eval/correct"] > before["eval/correct"] + 0.1
        assert after["eval/reward_mean"] > before["eval/reward_mean"] + 0.5


@pytest.mark.parametrize("name", CELLS)
def test_what_generates_is_what_was_trained(name: str, cells: Cells) -> None:
    """After every sync, and at the end in what was saved."""
    cell = cells[name]
    assert [line["step"] for line in cell.metrics] == list(range(1, STEPS + 1))
    assert max(line["weights/canary_gap"] for line in cell.metrics) < 1e-4
    written_by_the_policy = [line for line in cell.metrics if "rollout/logprob_gap_max" in line]
    assert all(line["rollout/logprob_gap_max"] < 1e-4 for line in written_by_the_policy)
    assert bool(written_by_the_policy) == (name not in OTHERS_WRITE)
    assert recorded_gap(saved(cell), cell.run / "rollouts" / f"eval-{STEPS:06d}.parquet") < 1e-4


@pytest.mark.parametrize("name", [name for name in CELLS if not name.endswith("full")])
def test_only_the_adapter_travels(name: str, cells: Cells) -> None:
    cell = cells[name]
    served = Path(result(cell)[2])
    assert {line["weights/sync_bytes"] for line in cell.metrics} == {adapter_bytes(served)}
    if "kl/mean" in cell.metrics[0]:
        assert cell.metrics[0]["kl/mean"] == pytest.approx(0.0, abs=1e-6)  # an adapter begins as nothing


def test_the_ranks_that_are_shown_are_those_of_the_last_step(cells: Cells) -> None:
    ranks = read_ranks(cells["grpo-adalora"].run / "model")
    assert ranks is not None
    last = cells["grpo-adalora"].metrics[-1]
    assert last["adalora/budget"] == ranks.target_r * len(ranks.layers)
    assert sum(each.rank for each in ranks.layers) / len(ranks.layers) == pytest.approx(last["adalora/rank_mean"])


def test_a_critic_that_warms_up_learns_alone(cells: Cells) -> None:
    """Then the policy has no gradient, and in the step after that it is still the reference."""
    lines = cells["ppo-lora"].metrics
    assert "policy/grad_norm" not in lines[0]
    assert lines[1]["kl/mean"] == pytest.approx(0.0, abs=1e-6)
    assert lines[2]["kl/mean"] != 0
    assert all(line["value/loss"] > 0 for line in lines)
    assert all(line["value/explained_variance"] <= 1 for line in lines)


def test_who_wrote_what_gkd_learned_from(cells: Cells) -> None:
    rows = pq.read_table(cells["gkd-adalora"].run / "rollouts" / "step-000001.parquet").to_pylist()
    assert all(row["completion"] == right(json.loads(row["prompt"])[-1]["content"]) for row in rows)
    assert "reward/mean" not in cells["gkd-full"].metrics[0]  # the rule only watches


def test_every_result_answers_alike_in_vllm_and_plainly(cells: Cells) -> None:
    prompts = [json.loads(line)["prompt"] for line in (MODELS / "held_out.jsonl").read_text().splitlines()[:16]]
    adapters: dict[str, list[tuple[str, str]]] = {}
    for name in CELLS:
        base, for_peft, for_vllm = result(cells[name])
        if cells[name].train_type == "qlora":
            base = result(cells["grpo-qlora"])[0]  # the same weights, de-quantized by every run
        adapters.setdefault(base, []).extend([(for_peft, for_vllm)] if for_peft else [])
    answers = greedy_answers(prompts, [{"model": model, "adapters": pairs} for model, pairs in adapters.items()])
    assert len(answers) == len(CELLS)
    for where, (plain, served) in answers.items():
        assert served == plain, where
        assert sum(answer == right(prompt) for prompt, answer in zip(prompts, served, strict=True)) > 12, where
