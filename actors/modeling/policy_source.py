"""What a run's policy begins as: a whole model, or an adapter on one that is merged into it or trained on.

It knows config and the adapter's small files, no engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from actors.config import LARGEST_RANK, PolicyConfig
from trainers.adapter_folder import AdapterFolder, continue_problems, is_adapter, read_adapter
from trainers.errors import Problem, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """`policy` is the config with a whole model; what stands on that model is at most one of the two adapters."""

    policy: PolicyConfig
    merged: AdapterFolder | None = None  # goes into the model before any role loads it
    continued: AdapterFolder | None = None  # is trained; rank and scale of `policy` are its own

    def in_run(self, merged: Path) -> PolicyConfig:
        """The config that the roles get: the model is the merged one where there is one."""
        return self.policy if self.merged is None else self.policy.model_copy(update={"model": str(merged)})


def find_origin(policy: PolicyConfig) -> Origin:
    """What `policy.model` and `policy.adapter` say. UserError for an adapter that cannot be used so."""
    if not is_adapter(policy.model):
        return Origin(policy=policy)
    adapter = read_adapter(policy.model, where="policy.model")
    on_base = policy.model_copy(update={"model": adapter.base})
    if policy.adapter == "merge":
        return Origin(policy=on_base, merged=adapter)
    if problems := _continue_problems(policy, adapter):
        raise UserError(problems)
    lora = policy.lora.model_copy(update={"r": adapter.rank, "alpha": adapter.alpha})
    return Origin(policy=on_base.model_copy(update={"lora": lora}), continued=adapter)


def _continue_problems(policy: PolicyConfig, adapter: AdapterFolder) -> list[Problem]:
    if policy.train_type not in ("lora", "qlora"):
        message = (
            f"continue trains the adapter itself, so that train_type {policy.train_type} cannot; set merge, or lora"
        )
        return [Problem("policy.adapter", message)]
    problems = [Problem("policy.model", reason) for reason in continue_problems(adapter, largest_rank=LARGEST_RANK)]
    if problems:
        return problems
    own = {"r": adapter.rank, "alpha": adapter.alpha}
    wanted = {
        key: getattr(policy.lora, key) for key in own if getattr(policy.lora, key) not in (own[key], _default(key))
    }
    problems = [
        Problem(f"policy.lora.{key}", f"{value:g}, but the adapter that is continued has {own[key]:g}; leave it out")
        for key, value in wanted.items()
    ]
    if policy.lora.target_modules != _default("target_modules"):
        message = "the adapter that is continued has layers of its own; leave it out"
        problems.append(Problem("policy.lora.target_modules", message))
    return problems


def _default(key: str) -> object:
    """Of `LoraConfig`: what a config file that a run wrote holds for a key that nobody set."""
    return type(PolicyConfig.model_fields["lora"].default).model_fields[key].default
