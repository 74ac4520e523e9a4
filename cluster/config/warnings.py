"""What a config may hold and was probably not meant: each with why, and what to do. It starts and reads nothing.

A warning does not block a run. A recommended range (in the schema, beside the field) is a habit of the field: a value
is reported only if its distance from the range is more than the range is wide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from actors.config import LoraConfig
from cluster.config.run import RunConfig, run_schema
from cluster.config.tree import get_path
from trainers.errors import Problem

LARGE = 100_000_000  # parameters; smaller models bear, and need, higher learning rates
HIGHEST_FULL = 2e-5  # learning rate
LOWEST_ADAPTER = {"lora": 1e-5, "qlora": 1e-5, "adalora": 1e-4}  # learning rates
SHORT = 20  # steps of a run that is soon done again
FEWEST_COMPARED = 4  # completions of a group
SEQUENCE_CLIP = 0.01  # ratios of whole sequences, per token, stay far nearer to 1 than this; those of tokens do not

_ADAPTIVE: tuple[str, ...] = (
    "init_r",
    "target_r",
    "tinit",
    "tfinal",
    "delta_t",
    "orth_reg_weight",
)  # read by adalora only

_TOO_LOW: Mapping[str, str] = {
    "algorithm.gamma": "a reward at the end hardly reaches an answer's first tokens",
    "algorithm.lam": "advantages rest on the critic alone, also while it is wrong",
    "sampling.temperature": "answers to a prompt come out alike, so that there is nothing to compare",
}
_TOO_HIGH: Mapping[str, str] = {
    "algorithm.kl.coef": "the policy is held so near the reference that it hardly learns",
    "algorithm.clip_low": "an update is hardly limited",
    "algorithm.clip_high": "an update is hardly limited",
    "policy.lora.r": "so large an adapter costs memory and time, and seldom learns more",
    "policy.lora.alpha": "it multiplies what the adapter does, as a much higher learning rate would",
    "sampling.n": "a step's time goes into answers that make its baseline little better",
    "sampling.temperature": "answers fall apart into random words, which is what is then trained on",
    "train.epochs_per_step": "the last passes learn from answers that the policy would not write any more",
    "train.max_grad_norm": "hardly a gradient is scaled down, and one bad batch can undo what was learnt",
    "train.weight_decay": "weights are drawn to 0 more than the rewards can hold them",
}


def advise(config: RunConfig, *, parameters: int | None = None) -> list[Problem]:
    """What was probably not meant; `parameters` is the size of the policy's model, where it is known."""
    return [
        *_out_of_range(config),
        *_learning_rates(config, parameters),
        *_without_effect(config),
        *_signal(config),
        *_clips(config),
        *_measured_and_kept(config),
    ]


def _out_of_range(config: RunConfig) -> Iterator[Problem]:
    kind, unused, tree = config.algorithm.type, _unused(config), config.model_dump(mode="json")
    for leaf in run_schema().leaves():
        usual = leaf.recommended
        if usual is None or leaf.path in unused:
            continue
        if kind not in (leaf.types or (kind,)) or kind not in (usual.algorithms or (kind,)):
            continue
        value, width = float(get_path(tree, leaf.path)), usual.high - usual.low
        reasons = _TOO_LOW if value < usual.low - width else _TOO_HIGH if value > usual.high + width else None
        if reasons is not None:
            yield Problem(leaf.path, f"{value:g} is far from the usual {usual}: {reasons[leaf.path]}; set one of these")


def _unused(config: RunConfig) -> set[str]:
    """Keys with a recommended range that the rest of the config leaves without effect, or gives another meaning."""
    critic, adapters, unused = config.algorithm.capabilities.critic, {config.policy.train_type}, set()
    if critic is not None:
        adapters.add(critic.train_type)
    if not adapters & {"lora", "qlora"}:
        unused.add("policy.lora.r")
    if adapters == {"full"}:
        unused.add("policy.lora.alpha")
    clip = config.algorithm.capabilities.ratio_clip
    if _on_policy(config) or (clip is not None and clip.level == "sequence"):
        unused |= {"algorithm.clip_low", "algorithm.clip_high"}
    return unused


def _on_policy(config: RunConfig) -> bool:
    """Whether every ratio is 1, since each sample is learnt from once, by the policy that wrote it."""
    return config.train.updates_per_step * config.train.epochs_per_step == 1


def _learning_rates(config: RunConfig, parameters: int | None) -> Iterator[Problem]:
    rate, train_type, uses = config.train.learning_rate, config.policy.train_type, config.algorithm.capabilities
    lowest = LOWEST_ADAPTER.get(train_type, 0.0)
    large = parameters is not None and parameters >= LARGE and uses.learns_from_rewards
    if rate == 0:
        yield Problem("train.learning_rate", "0 leaves the policy as it is; set a rate, such as 1e-6 for all weights")
    elif rate < lowest:
        than = "lora's, as its singular values begin at 0" if train_type == "adalora" else "that of all weights"
        advice = f"an adapter's rate is usually ten times {than}; try {lowest:g} or more"
        yield Problem("train.learning_rate", f"{rate:g} is low for {train_type}: {advice}")
    elif train_type == "full" and large and rate > HIGHEST_FULL:
        why = "large models usually bear 1e-7 to 1e-5 in online RL, and unlearn their language with more"
        yield Problem("train.learning_rate", f"{rate:g} is high for all weights: {why}; start with 1e-6")
    critic = uses.critic
    if critic is None or (critic.train_type == "full") != (train_type == "full"):
        return
    if critic.learning_rate < rate / 4:
        why = "a critic that learns slower than the policy judges answers by a policy that is gone"
        message = f"{critic.learning_rate:g} is far below train.learning_rate {rate:g}: {why}; set as much or more"
        yield Problem("algorithm.critic.learning_rate", message)


def _without_effect(config: RunConfig) -> Iterator[Problem]:
    """Keys of an adapter that the train type does not read, set all the same."""
    train_type, lora, default = config.policy.train_type, config.policy.lora, LoraConfig()
    unread, advice = _ADAPTIVE, f"{train_type} does not read it; leave it out, or set policy.train_type: adalora"
    if train_type == "adalora":
        unread = ("r",) if "policy.lora.r" in _unused(config) else ()
        advice = "adalora begins with init_r and ends with target_r; set these"
    for name in unread:
        if (value := getattr(lora, name)) != getattr(default, name):
            yield Problem(f"policy.lora.{name}", f"{value:g} has no effect: {advice}")


def _signal(config: RunConfig) -> Iterator[Problem]:
    """What the policy learns from."""
    algorithm, uses, n = config.algorithm, config.algorithm.capabilities, config.sampling.n
    if uses.group_baseline == "mean" and 1 < n < FEWEST_COMPARED:
        why = "the mean of so few is a poor baseline, and many groups have equal rewards"
        yield Problem("sampling.n", f"{n} answers are few to compare: {why}; use {FEWEST_COMPARED} or more, 8 is usual")
    if uses.policy_share == 0:
        why = "the policy never writes, and so never learns from its own mistakes"
        yield Problem("algorithm.lmbda", f"with 0 this is not online training: {why}; set 0.5 or more")
    if not uses.learns_from_rewards:
        for index, reward in enumerate(config.rewards):
            if reward.weight != 0:
                why = f"{algorithm.type} does not learn from rewards, and this one is monitored only"
                yield Problem(f"rewards.{index}.weight", f"{reward.weight:g} has no effect: {why}; set 0 to say so")
    elif algorithm.kl.coef == 0 and any(r.learned_max_tokens is not None and r.weight != 0 for r in config.rewards):
        why = "nothing holds the policy back from what only the reward model likes"
        yield Problem("algorithm.kl.coef", f"0 beside a learned reward: {why}; set 0.05, or judge by rules only")
    longest = config.data.max_prompt_tokens + config.sampling.max_tokens
    for index, reward in enumerate(config.rewards):
        if (limit := reward.learned_max_tokens) is not None and limit < longest:
            why = f"prompt and answer may have {longest} tokens, and a longer chat has no score"
            yield Problem(f"rewards.{index}.max_tokens", f"{limit} is short: {why}; set {longest} or more")


def _clips(config: RunConfig) -> Iterator[Problem]:
    """Clips that are meant for the other kind of ratio."""
    clips = config.algorithm.capabilities.ratio_clip
    if clips is None or _on_policy(config):
        return
    for path, clip in (("algorithm.clip_low", clips.low), ("algorithm.clip_high", clips.high)):
        if clips.level == "sequence" and clip >= SEQUENCE_CLIP:
            why = "the ratio of a sequence, per token, hardly ever gets that far from 1"
            yield Problem(path, f"{clip:g} limits nothing: {why}; GSPO uses about 0.0003")
        elif clips.level == "token" and clip < SEQUENCE_CLIP:
            why = "most tokens' ratios leave that with the first update, and no longer count in the next"
            yield Problem(path, f"{clip:g} cuts nearly everything off: {why}; 0.2 is usual")


def _measured_and_kept(config: RunConfig) -> Iterator[Problem]:
    steps, every = config.train.steps, config.checkpoint.every
    if config.data.eval_prompts is None:
        message = "no held-out prompts: overfitting will not be visible; hold some prompts back in a file of their own"
        yield Problem("data.eval_prompts", message)
    if steps > SHORT and (every == 0 or every >= steps):
        why = f"what kills the run after hours takes all of its {steps} steps"
        yield Problem("checkpoint.every", f"no checkpoint comes before the end: {why}; set {SHORT}, say")
