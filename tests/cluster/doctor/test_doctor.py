"""The Doctor on made curves: each disease, several seeds, against healthy noisy runs; and on real runs.

Curves are written here by formula (level, drift, noise), so what must be found is known beforehand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.config.run import load_config, parse_config
from cluster.doctor import RULES, Finding, SampleSummary, diagnose
from cluster.doctor.curves import Series, spikes
from tests.cluster.doctor.runs.record import SICK, TAUGHT

REAL = Path(__file__).parent / "runs"
EXAMPLE = REAL.parents[3] / "examples" / "arithmetic" / "grpo.yaml"
SEEDS = range(8)
Curves = dict[str, np.ndarray]


def config(**algorithm: Any) -> dict[str, Any]:
    tree = {
        "policy": {"model": "toy", "dtype": "float32"},
        "data": {"prompts": "p.jsonl"},
        "rewards": [
            {"type": "model", "model": "judge", "name": "preference"},
            {"type": "function", "path": "rules.py:correct", "weight": 0},
        ],
        "algorithm": {"type": "grpo", "kl": algorithm},
    }
    return parse_config(tree).model_dump(mode="json")


def healthy(seed: int, steps: int = 200) -> Curves:
    """A run that learns: reward and accuracy rise and level off, KL levels off, entropy halves; all with noise."""
    rng = np.random.default_rng(seed)
    progress = 1 - np.exp(-np.arange(steps) / (steps / 4))

    def noise(scale: float) -> np.ndarray:
        return rng.normal(0, scale, steps)

    return {
        "reward/mean": progress + noise(0.15),
        "reward/std": 1.0 + noise(0.05),
        "reward/preference": progress + noise(0.15),
        "reward/correct": 0.3 + 0.3 * progress + noise(0.05),
        "reward/failed": np.zeros(steps),
        "kl/mean": 0.08 * progress + np.abs(noise(0.004)),
        "policy/entropy": 1.0 - 0.4 * progress + noise(0.03),
        "policy/loss": noise(0.02),
        "policy/grad_norm": 0.8 * np.exp(noise(0.4)),  # heavy-tailed
        "policy/clip_fraction": np.abs(noise(0.05)),
        "advantage/zero_groups": np.clip(0.1 + 0.2 * progress + noise(0.08), 0, 1),
        "rollout/length_mean": 200 + 30 * progress + noise(10),
        "rollout/truncated_fraction": np.clip(noise(0.02), 0, 1),
        "rollout/samples": np.full(steps, 256),
        "rollout/logprob_gap_mean": 1e-7 * np.exp(noise(0.5)),
        "rollout/logprob_gap_p999": 2e-6 * np.exp(noise(0.5)),
        "rollout/logprob_gap_max": 5e-6 * np.exp(noise(0.5)),
    }


def rows(curves: Curves) -> list[dict[str, Any]]:
    steps = len(next(iter(curves.values())))
    return [{"step": i + 1} | {key: float(values[i]) for key, values in curves.items()} for i in range(steps)]


def found(curves: Curves, samples: Sequence[SampleSummary] = (), **algorithm: Any) -> dict[str, Finding]:
    findings = diagnose(rows(curves), config(**algorithm), samples)
    assert len({finding.rule for finding in findings}) == len(findings)
    return {finding.rule: finding for finding in findings}


def changes(finding: Finding) -> dict[str, Any]:
    return {change.key: change.value for change in finding.remedy.changes}


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("steps", [60, 200, 1000])
def test_healthy_runs_get_no_finding(seed: int, steps: int) -> None:
    assert found(healthy(seed, steps)) == {}


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("steps", [1, 4, 12, 19])
def test_short_runs_get_nothing_rash(seed: int, steps: int) -> None:
    assert found(healthy(seed, steps)) == {}


def test_nothing_recorded() -> None:
    assert diagnose([], config()) == []
    assert diagnose([{"step": 0, "eval/reward_mean": 0.5}], config()) == []


# What a disease does to a healthy run's curves.


def hacked(c: Curves) -> None:
    ramp = np.linspace(0, 1, len(c["kl/mean"]))
    c["reward/correct"] = c["reward/correct"] - 0.6 * ramp
    c["kl/mean"] = c["kl/mean"] + 0.3 * ramp**2


def longer(c: Curves) -> None:
    ramp = np.linspace(0, 1, len(c["kl/mean"]))
    c["rollout/length_mean"] = c["rollout/length_mean"] * (1 + ramp)
    c["kl/mean"] = c["kl/mean"] + 0.3 * ramp**2


def jumping(c: Curves) -> None:
    c["policy/grad_norm"][-40::8] = 40.0
    c["kl/mean"][-39::8] = 0.45


def leaping(c: Curves) -> None:
    c["kl/mean"][-39::8] = 0.45


def clipped(c: Curves) -> None:
    c["policy/clip_fraction"] = c["policy/clip_fraction"] + 0.4


def exploding(c: Curves) -> None:
    c["policy/loss"][-30] = np.nan


def collapsed(c: Curves) -> None:
    ramp = np.linspace(0, 1, len(c["kl/mean"]))
    c["policy/entropy"] = c["policy/entropy"] * (1 - 0.95 * np.sqrt(ramp))
    c["advantage/zero_groups"] = np.clip(c["advantage/zero_groups"] + 0.9 * ramp, 0, 1)
    c["reward/mean"] = c["reward/mean"] * 0 + c["reward/std"]  # flat, noisy
    c["reward/correct"] = c["reward/correct"] * 0 + 0.3


def flat(c: Curves) -> None:
    c["reward/mean"] = c["reward/std"]


def still(c: Curves) -> None:
    flat(c)
    c["kl/mean"] = c["kl/mean"] * 1e-3


def falling(c: Curves) -> None:
    c["reward/mean"] = -c["reward/mean"]


def idle(c: Curves) -> None:
    flat(c)
    c["advantage/zero_groups"] = np.full_like(c["kl/mean"], 0.9)


def spreadless(c: Curves) -> None:
    c["reward/std"] = c["reward/std"] * 1e-5
    c["reward/mean"] = c["reward/std"] + 0.5


def distant(c: Curves) -> None:
    c["kl/mean"] = c["kl/mean"] + 0.8


def negative(c: Curves) -> None:
    c["kl/mean"] = c["kl/mean"] - 0.2


def unmoved(c: Curves) -> None:
    distilled(c, 0.0)


def misled(c: Curves) -> None:
    distilled(c, -0.6)


def distilled(c: Curves, lost: float) -> None:
    """A GKD run without rewards, whose divergence loses so much of itself."""
    steps = len(c["kl/mean"])
    for key in [key for key in c if key.startswith(("reward/", "kl/", "advantage/"))]:
        del c[key]
    c["distill/jsd"] = 0.08 * (1 - lost * (1 - np.exp(-np.arange(steps) / (steps / 4)))) + 0.2 * c["policy/loss"]


def cut(c: Curves) -> None:
    c["rollout/truncated_fraction"] = c["rollout/truncated_fraction"] + 0.3


def failing(c: Curves) -> None:
    c["reward/failed"] = np.full_like(c["kl/mean"], 6)


def gap(c: Curves) -> None:
    c["rollout/logprob_gap_p999"] = c["rollout/logprob_gap_p999"] + 7e-4


LOWERED = re.compile(r"(?<![\w/.`])(kl|gkd|ess|cuda|lora|jsd)(?![\w/.`])")  # abbreviations that lost their capitals

DISEASES: list[tuple[Callable[[Curves], None], str, str]] = [
    (hacked, "reward_hacking", "critical"),
    (longer, "reward_hacking", "warning"),
    (jumping, "unstable_training", "critical"),
    (leaping, "unstable_training", "warning"),
    (clipped, "unstable_training", "warning"),
    (exploding, "unstable_training", "critical"),
    (collapsed, "mode_collapse", "critical"),
    (flat, "no_improvement", "warning"),
    (still, "no_improvement", "warning"),
    (falling, "no_improvement", "critical"),
    (unmoved, "teacher_not_followed", "warning"),
    (misled, "teacher_not_followed", "critical"),
    (idle, "too_little_signal", "warning"),
    (spreadless, "reward_without_spread", "critical"),
    (distant, "kl_range", "warning"),
    (negative, "kl_range", "warning"),
    (cut, "truncation", "warning"),
    (failing, "reward_failures", "warning"),
    (gap, "logprob_gap", "critical"),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("disease", "rule", "severity"), DISEASES, ids=lambda value: getattr(value, "__name__", None))
def test_a_disease_is_found(disease: Callable[[Curves], None], rule: str, severity: str, seed: int) -> None:
    curves = healthy(seed)
    disease(curves)
    finding = found(curves)[rule]
    assert finding.severity == severity
    assert finding.title
    assert finding.explanation.endswith(".")
    assert not LOWERED.search(f"{finding.title} {finding.explanation} {finding.remedy.text}")
    assert finding.remedy.text.endswith((".", "?"))
    assert finding.curves
    assert all(curve.key in curves and len(curve.steps) == len(curve.values) for curve in finding.curves)


@pytest.mark.parametrize(("disease", "rule", "severity"), DISEASES, ids=lambda value: getattr(value, "__name__", None))
def test_a_remedy_is_a_valid_config(disease: Callable[[Curves], None], rule: str, severity: str) -> None:
    curves = healthy(0)
    disease(curves)
    tree = config()
    for key, value in changes(found(curves)[rule]).items():
        node: Any = tree
        *path, last = key.split(".")
        for part in path:
            node = node[int(part)] if isinstance(node, list) else node[part]
        assert last in node
        assert node[last] != value
        node[last] = value
    parse_config(tree)


def test_every_rule_has_a_disease() -> None:
    assert {rule for _, rule, _ in DISEASES} == {rule.__name__ for rule in RULES}


def test_the_gravest_come_first() -> None:
    curves = healthy(0)
    cut(curves)
    gap(curves)
    assert [f.severity for f in diagnose(rows(curves), config())] == ["critical", "warning"]


def test_the_kl_coefficient_is_doubled_and_at_least_the_recommended() -> None:
    curves = healthy(0)
    hacked(curves)
    assert changes(found(curves, coef=0.08)["reward_hacking"]) == {"algorithm.kl.coef": 0.16}
    assert changes(found(curves, coef=0.0)["reward_hacking"]) == {"algorithm.kl.coef": 0.05}


def test_longer_answers_alone_are_no_hacking() -> None:
    """Reasoning grows longer too; the KL must grow with it."""
    curves = healthy(1)
    curves["rollout/length_mean"] = curves["rollout/length_mean"] * np.linspace(1, 2, 200)
    assert found(curves) == {}


def test_a_watched_reward_that_rises_is_no_hacking() -> None:
    curves = healthy(1)
    curves["kl/mean"] = curves["kl/mean"] + 0.3 * np.linspace(0, 1, 200) ** 2
    assert found(curves) == {}


def test_answers_that_repeat_themselves() -> None:
    summaries = [
        SampleSummary(step=1, samples=256, distinct_share=0.9, looping_share=0.0),
        SampleSummary(step=200, samples=256, distinct_share=0.9, looping_share=0.4, looping=("200-3",)),
    ]
    finding = found(healthy(2), summaries)["reward_hacking"]
    assert "40% of the completions repeat themselves" in finding.explanation
    assert [(s.step, s.sample_id) for s in finding.samples] == [(200, "200-3")]


def test_one_answer_for_all_is_a_collapse_though_groups_differ_in_reward() -> None:
    curves = healthy(3)
    curves["policy/entropy"] = curves["policy/entropy"] * np.linspace(1, 0.02, 200)
    flat(curves)
    summaries = [
        SampleSummary(step=1, samples=256, distinct_share=0.9, looping_share=0.0),
        SampleSummary(step=200, samples=256, distinct_share=0.2, looping_share=0.0, alike=("200-0", "200-1")),
    ]
    finding = found(curves, summaries)["mode_collapse"]
    assert "90% to 20%" in finding.explanation
    assert changes(finding) == {"sampling.temperature": 1.2, "algorithm.kl.coef": 0.1, "algorithm.clip_high": 0.28}


def test_groups_that_agree_because_they_are_right_are_no_alarm() -> None:
    """The reward rises, the entropy falls, the groups agree: told, as information only."""
    curves = healthy(4)
    curves["policy/entropy"] = np.linspace(1, 0.1, 200)
    curves["advantage/zero_groups"] = np.linspace(0, 0.95, 200)
    assert {rule: f.severity for rule, f in found(curves).items()} == {
        "mode_collapse": "info",
        "too_little_signal": "info",
    }


def test_a_reward_that_fails_is_named_and_gets_more_time() -> None:
    curves = healthy(5)
    failing(curves)
    summary = SampleSummary(
        step=200, samples=256, distinct_share=0.9, looping_share=0.0, failed=("200-7",), failed_by=("correct",)
    )
    finding = found(curves, [summary])["reward_failures"]
    assert changes(finding) == {"rewards.1.timeout_s": 120.0}
    assert "2.3% of the last 50 steps' samples" in finding.explanation  # 6 / 256
    curves["reward/failed"] = curves["reward/failed"] * 3  # 7 %, over half of the 10 % that stop the run
    assert found(curves, [summary])["reward_failures"].severity == "critical"


def test_an_adaptive_controller_that_does_not_catch_up() -> None:
    curves = healthy(6)  # settles near 0.08
    assert "kl_range" not in found(curves, controller="adaptive", target=0.08)
    finding = found(curves, controller="adaptive", target=0.02)["kl_range"]
    assert changes(finding) == {"algorithm.kl.horizon": 5000, "algorithm.kl.coef": 0.1}


def test_a_level_that_changes_is_no_spike() -> None:
    values = (1.0,) * 50 + (20.0,) * 50
    assert spikes(Series("x", tuple(range(100)), values), factor=4, above=0) == []


def test_trends_are_told_from_wandering() -> None:
    """A level that wanders slowly (AR(1), 0.9) is seldom told to rise; as white noise it would be in a quarter."""
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(500):
        values = [0.0]
        for step in rng.normal(0, 1, 199):
            values.append(0.9 * values[-1] + step)
        told += Series("x", tuple(range(200)), tuple(values)).rose(at_least=0.0)
    assert told < 15


def real(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (REAL / f"{name}.jsonl").read_text().splitlines()]


def test_a_real_run_that_learned_gets_no_finding() -> None:
    """80 steps of GRPO on arithmetic at 4e-5: accuracy rises, half of the groups agree at the end."""
    assert diagnose(real("healthy"), config(coef=0.02)) == []


def test_a_real_run_with_too_high_a_learning_rate() -> None:
    """The same task at 5e-4: the KL divergence leaps to 0.6 nats per token in ten steps and stays."""
    (finding,) = diagnose(real("rate_too_high"), config(coef=0.02))
    assert (finding.rule, finding.severity) == ("kl_range", "warning")
    assert changes(finding) == {"algorithm.kl.coef": 0.05, "train.learning_rate": 5e-07}


def test_a_real_run_that_hacked_its_reward() -> None:
    """Trained on the number of nines in the answer, correctness only watched, 2e-4, KL coefficient 0.001.

    In 30 steps every answer is nines up to the limit: reward 0.3 to 8, correct 0.5 to 0, KL 5.7 nats per token.
    """
    found = {finding.rule: finding for finding in diagnose(real("hacked"), config(coef=0.001))}
    assert {rule: finding.severity for rule, finding in found.items()} == {
        "reward_hacking": "critical",
        "kl_range": "critical",
        "truncation": "critical",
        "mode_collapse": "warning",
        "too_little_signal": "warning",
    }
    assert "the monitored reward correct fell from 0.148 to 0" in found["reward_hacking"].explanation
    assert changes(found["truncation"]) == {"algorithm.kl.coef": 0.05}, "more room would only make more nines"
    assert "solved" not in found["too_little_signal"].explanation


def test_a_real_run_that_its_first_step_wrecked() -> None:
    """2e-2 with four updates a step: a gradient norm of 2430, and from the second step on nonsense.

    Windows cannot see the fall, for all of the early one lies behind it.
    """
    found = {finding.rule: finding for finding in diagnose(real("wrecked"), config(coef=0.02))}
    assert {rule: finding.severity for rule, finding in found.items()} == {
        "no_improvement": "critical",
        "kl_range": "critical",
        "truncation": "critical",
        "unstable_training": "warning",
    }
    assert found["no_improvement"].explanation == "The reward went from 0.312 to -1.98 over 23 steps."
    assert found["unstable_training"].explanation.startswith("The gradient norm was 2430 at step 1.")


@pytest.mark.parametrize("lost", [0.1, 0.5, 0.9])
def test_a_policy_that_follows_its_teacher_is_well(lost: float) -> None:
    curves = healthy(0)
    distilled(curves, lost)
    assert found(curves) == {}


@pytest.mark.parametrize("seed", range(20))
def test_who_writes_is_no_change(seed: int) -> None:
    """The level is another one where the teacher wrote; who writes is drawn, and the policy is near already."""
    curves = healthy(seed)
    distilled(curves, 0.1)
    metrics = rows(curves)
    for row, own in zip(metrics, np.random.default_rng(seed).random(len(metrics)) < 0.5, strict=True):
        if not own:
            row["distill/jsd"] *= 0.3
            del row["rollout/logprob_gap_mean"], row["rollout/logprob_gap_p999"], row["rollout/logprob_gap_max"]
    assert diagnose(metrics, config()) == []


def test_a_policy_that_was_its_teacher_from_the_start_is_well() -> None:
    curves = healthy(0)
    distilled(curves, 0.0)
    curves["distill/jsd"] = np.abs(curves["distill/jsd"] - 0.08) * 0.1
    assert found(curves) == {}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("still", {"no_improvement": "warning"}),
        ("spreadless", {"reward_without_spread": "critical", "too_little_signal": "warning"}),
        ("failing", {"reward_failures": "warning"}),
        ("gap", {"logprob_gap": "critical"}),
        ("dissolved", {"truncation": "critical", "no_improvement": "warning"}),
    ],
)
def test_a_real_run_made_to_show_a_disease(name: str, expected: dict[str, str]) -> None:
    """As `runs/record.py` made it, and nothing else is found. Dissolved: rewards thrown by dice, at 1e-3."""
    tree = load_config(EXAMPLE, list(SICK[name])).model_dump(mode="json")
    lines = (REAL / f"{name}.samples.jsonl").read_text().splitlines()
    findings = diagnose(real(name), tree, [SampleSummary(**json.loads(line)) for line in lines])
    assert {finding.rule: finding.severity for finding in findings} == expected


@pytest.mark.parametrize(("name", "expected"), [("taught", {}), ("untaught", {"teacher_not_followed": "warning"})])
def test_real_runs_with_a_teacher(name: str, expected: dict[str, str]) -> None:
    """Half of the steps are the teacher's own answers. Untaught: at 1e-8."""
    tree = load_config(EXAMPLE.with_name("gkd.yaml"), list(TAUGHT[name])).model_dump(mode="json")
    assert {finding.rule: finding.severity for finding in diagnose(real(name), tree)} == expected


def test_findings_are_plain_values() -> None:
    curves = healthy(0)
    hacked(curves)
    (finding,) = (f for f in diagnose(rows(curves), config()) if f.rule == "reward_hacking")
    plain = json.loads(json.dumps(finding.as_json()))
    assert set(plain) == {"rule", "severity", "title", "explanation", "evidence", "remedy"}
    assert plain["remedy"]["changes"] == [{"key": "algorithm.kl.coef", "value": 0.1}]
    first = plain["evidence"]["metrics"][0]
    assert first["key"] == "reward/mean"
    assert len(first["steps"]) == len(first["values"]) <= 60
    assert first["steps"][-1] == 200
