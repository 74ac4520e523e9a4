"""What can be found wrong with the rewards before anything is started.

It reads files and runs nothing of the user's; the import of a function's file is tried when the service starts. It
loads no engine: what each source reads is in its own file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from actors.rewards.catalog import make_source
from actors.rewards.config import RewardConfig, reward_names
from trainers.errors import Problem, UserError


def validate_rewards(configs: Sequence[RewardConfig], base_dir: Path) -> list[Problem]:
    """Every problem found; paths count from `base_dir`, the config file's folder."""
    problems: list[Problem] = []
    try:
        reward_names(configs)
    except UserError as error:
        problems += error.problems
    for index, config in enumerate(configs):
        if found := make_source(config, name=str(index), base_dir=base_dir).check():
            problems.append(Problem(f"rewards.{index}.{found.where}", found.message))
    return problems
