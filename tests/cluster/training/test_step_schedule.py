"""What an algorithm's keys mean for a step: who writes it, and whether the policy is trained."""

from __future__ import annotations

from typing import Any

from cluster.config.run import RunConfig, parse_config
from cluster.training.step_schedule import rollout_source, update_options
from trainers.schedule import policy_writes


def config(algorithm: dict[str, Any], **data: Any) -> RunConfig:
    return parse_config(
        {
            "policy": {"model": "org/policy"},
            "data": {"prompts": "prompts.jsonl", **data},
            "rewards": [{"type": "model", "model": "org/judge"}],
            "algorithm": algorithm,
            "train": {"steps": 40},
        }
    )


def gkd(lmbda: float) -> dict[str, Any]:
    return {"type": "gkd", "lmbda": lmbda, "teacher": {"model": "org/teacher"}}


def test_with_grpo_the_policy_writes_and_learns_always() -> None:
    grpo = config({"type": "grpo"})
    assert {rollout_source(grpo, step) for step in range(40)} == {"policy"}
    assert not grpo.serves_teacher
    order = update_options(grpo, 0, kl_coef=0.25)
    assert (order.kl_coef, order.train_policy, order.from_policy) == (0.25, True, True)


def test_gkds_draw_gives_steps_to_the_teacher_or_to_the_data() -> None:
    """Half of the steps by the draw; whoever else writes, its log-probabilities are not the policy's."""
    taught, given = config(gkd(0.5)), config(gkd(0.5), strip_responses=True)
    for step in range(40):
        own = policy_writes(0, step, 0.5)
        assert rollout_source(taught, step) == ("policy" if own else "teacher")
        assert rollout_source(given, step) == ("policy" if own else "data")
        assert update_options(taught, step, kl_coef=0.0).from_policy == own
        assert update_options(taught, step, kl_coef=0.0).steers_kl == own
    assert len({rollout_source(taught, step) for step in range(40)}) == 2
    assert taught.serves_teacher
    assert not given.serves_teacher
    assert not config(gkd(1.0)).serves_teacher


def test_a_served_teacher_has_an_engine_whoever_writes() -> None:
    served = config(gkd(1.0) | {"top_k": 12, "teacher": {"model": "org/teacher", "served": True}}, strip_responses=True)
    assert served.serves_teacher
    assert served.served_top_k == 12
    assert config(gkd(0.5) | {"top_k": 12}).served_top_k is None  # the learners hold it


def test_ppos_critic_learns_alone_first() -> None:
    ppo = config({"type": "ppo", "critic": {"warmup_steps": 3}})
    assert ppo.critic_steps == 3
    assert [update_options(ppo, step, kl_coef=0.1).train_policy for step in range(5)] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert [update_options(ppo, step, kl_coef=0.1).steers_kl for step in range(5)] == [False, False, False, True, True]


def test_the_policys_optimizer_steps_are_those_in_which_it_learns() -> None:
    steps = config({"type": "ppo", "critic": {"warmup_steps": 3}}).model_dump(mode="json")
    steps["train"] |= {"updates_per_step": 2, "epochs_per_step": 5}
    assert parse_config(steps).policy_updates == (40 - 3) * 2 * 5


def test_gkd_watches_its_rewards_whatever_their_weight() -> None:
    assert [reward.weight for reward in config(gkd(0.5)).scored_rewards] == [0.0]
    assert [reward.weight for reward in config({"type": "grpo"}).scored_rewards] == [1.0]
