"""What an algorithm's own keys mean for a step of the loop: who writes it, what is kept, what its update trains.

Pure: the config and the step's number (steps done before it) decide, so that a resumed run does the same.
"""

from __future__ import annotations

from actors.messages import UpdateOptions
from cluster.config.run import RunConfig
from cluster.training.rollouts import Writer
from trainers.schedule import policy_writes
from trainers.types import Rollout


def rollout_source(config: RunConfig, step: int) -> Writer:
    """The policy; in steps that the algorithm leaves to others, the data (if it holds responses) or the teacher."""
    if policy_writes(config.seed, step, config.algorithm.capabilities.policy_share):
        return "policy"
    return "data" if config.data.strip_responses else "teacher"


def has_reward_variance(rollout: Rollout) -> bool:
    """Whether the group's rewards differ (SEMANTICS: dynamic sampling); one that nobody could score is kept.

    >>> from types import SimpleNamespace as Group
    >>> [has_reward_variance(Group(reward=reward)) for reward in ((1.0, 0.0), (1.0, None, 1.0), (None, None))]
    [True, False, True]
    """
    scores = {reward for reward in rollout.reward if reward is not None}
    return len(scores) != 1


def update_options(config: RunConfig, step: int, *, kl_coef: float) -> UpdateOptions:
    """How the step's updates are made."""
    return UpdateOptions(
        kl_coef=kl_coef,
        train_policy=step >= config.critic_steps,
        from_policy=rollout_source(config, step) == "policy",
    )
