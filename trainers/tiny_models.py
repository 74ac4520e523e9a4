"""The tiny models of the examples and the tests, made only from code and a seed: policy, reward model, teacher.

The policy learns the chat format and to add, with random slips: greedy it is nearly always right, sampled in less than
half of the cases, which is a good start for RL. The reward model is such a model with two more layers, which learn from
pairs which of two answers is better. It knows torch, transformers and tokenizers; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from trainers import arithmetic

Progress = Callable[[int, int], None]  # steps done, steps in all

PAD, TURN_START, TURN_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DIGITS = "0123456789"
CONTEXT = 512  # tokens
HEAD_DIM = 32  # the smallest that vLLM's attention on the CPU supports
HIDDEN, INTERMEDIATE, LAYERS = 160, 576, 3  # 1.06 M parameters
JUDGING_LAYERS = 2  # of the reward model, on top of such a model

POLICY_STEPS = 300
JUDGING_STEPS = 140
SUMS_PER_STEP = 64
SLIP = 0.3  # probability that a digit of a training answer is random
READING = 0.3  # weight of predicting the token that was just read
JUDGED_PER_STEP, WRONG_PER_SUM = 32, 3
CENTER = 0.1  # keeps right answers as far above 0 as wrong ones are below, for every kind of mistake
SURENESS = 3.0  # of the teacher: factor on the policy's logits
ADDING_RATE, JUDGING_RATE, WARM_UP = 5e-3, 1e-2, 30


def recipe() -> str:
    """A digest of the code that makes the models: it changes with the code."""
    digest = hashlib.sha256()
    for module in (__file__, arithmetic.__file__):
        digest.update(Path(module).read_bytes())
    return digest.hexdigest()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: a token for every byte, so that any text can be encoded and decoded, and one for each role's name.

    >>> tokenizer = make_tokenizer()
    >>> tokenizer.decode(tokenizer("37+48=85 ü").input_ids)
    '37+48=85 ü'
    """
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for role in ("system", "user", "assistant"):
        for end in range(2, len(role) + 1):
            merges.append((role[: end - 1], role[end - 1]))
            tokens.append(role[:end])
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (PAD, TURN_START, TURN_END)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=TURN_END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_policy(
    path: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    tie_word_embeddings: bool = True,
    progress: Progress | None = None,
) -> None:
    """Saves a trained Qwen3 model (1.06 M parameters, float32) and its tokenizer under `path`; 40 s on one core.

    It answers sums in the right form; of the held-out ones about 98 % are right greedily, 40 % at temperature 1.
    `steps`: None for all of `POLICY_STEPS`; with few steps it learns little. Leaves global RNGs as they are.
    """
    steps = POLICY_STEPS if steps is None else steps
    tokenizer = make_tokenizer()
    config = _config(tokenizer, layers=LAYERS, hidden=HIDDEN, tie_word_embeddings=tie_word_embeddings)
    model = _seeded(seed, lambda: Qwen3ForCausalLM(config))
    _train_sums(model, tokenizer, seed=seed, steps=steps, report=_reporter(progress, total=steps))
    _save(path, model, tokenizer)


def make_teacher(path: Path, policy: Path) -> None:
    """Saves the model under `policy` with scaled logits: its samples are right nearly as often as its greedy text."""
    model = Qwen3ForCausalLM.from_pretrained(policy, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        model.model.norm.weight.mul_(SURENESS)  # scales the logits, as if sampled at temperature 1 / SURENESS
    _save(path, model, make_tokenizer())


def make_reward_model(
    path: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    policy: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Saves a Qwen3 sequence classifier with one label (1.7 M parameters, float32) and its tokenizer under `path`.

    It extends a trained model: the one that `make_policy` saved under `policy`, else one that is trained here first
    (`POLICY_STEPS`, or `steps`). Those weights are frozen under two new layers and a head, which learn from pairs in
    `JUDGING_STEPS` (or `steps`): Bradley–Terry, −log σ(r_chosen − r_rejected), at the end of the text and at each
    token from where the two differ, centered as in Eisenstein et al. 2023 (arXiv 2312.09244). It takes 35 s on one
    core and orders more than 99 % of the held-out pairs correctly. Leaves global RNGs as they are.
    """
    tokenizer = make_tokenizer()
    judging_steps = JUDGING_STEPS if steps is None else steps
    adding_steps = (POLICY_STEPS if steps is None else steps) if policy is None else 0
    report = _reporter(progress, total=adding_steps + judging_steps)
    if policy is None:
        adder = _seeded(seed, lambda: Qwen3ForCausalLM(_config(tokenizer, layers=LAYERS, hidden=HIDDEN)))
        _train_sums(adder, tokenizer, seed=seed, steps=adding_steps, report=report)
    else:
        adder = Qwen3ForCausalLM.from_pretrained(policy, dtype=torch.float32, local_files_only=True)
    config = _config(tokenizer, layers=LAYERS + JUDGING_LAYERS, hidden=HIDDEN, num_labels=1)
    model = _seeded(seed, lambda: Qwen3ForSequenceClassification(config))
    model.model.embed_tokens.load_state_dict(adder.model.embed_tokens.state_dict())
    model.model.layers[:LAYERS].load_state_dict(adder.model.layers.state_dict())
    for frozen in (model.model.embed_tokens, model.model.layers[:LAYERS]):
        frozen.requires_grad_(False)
    _train_preferences(model, tokenizer, seed=seed, steps=judging_steps, report=report)
    _save(path, model, tokenizer)


def make_random_policy(
    path: Path, *, seed: int = 0, tie_word_embeddings: bool = True, layers: int = 2, hidden: int = 64
) -> None:
    """Saves a policy with random weights and its tokenizer; `hidden` is a multiple of 64."""
    tokenizer = make_tokenizer()
    config = _config(tokenizer, layers=layers, hidden=hidden, tie_word_embeddings=tie_word_embeddings)
    _save(path, _seeded(seed, lambda: Qwen3ForCausalLM(config)), tokenizer)


def make_random_reward_model(path: Path, *, seed: int = 0, layers: int = 2, hidden: int = 64) -> None:
    """Saves a reward model with random weights and its tokenizer; `hidden` is a multiple of 64."""
    tokenizer = make_tokenizer()
    config = _config(tokenizer, layers=layers, hidden=hidden, num_labels=1)
    _save(path, _seeded(seed, lambda: Qwen3ForSequenceClassification(config)), tokenizer)


def _config(tokenizer: PreTrainedTokenizerFast, *, layers: int, hidden: int, **more: Any) -> Qwen3Config:
    heads = hidden // (2 * HEAD_DIM) * 2  # even, so that two GPUs can share them
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=INTERMEDIATE * hidden // HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads > 2 else heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"tie_word_embeddings": True, **more},
    )


def _seeded(seed: int, make: Callable[[], Any]) -> Any:
    """The result of `make` with torch's generator at `seed`; the generator's state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def _save(path: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _reporter(progress: Progress | None, *, total: int) -> Callable[[], None]:
    done = 0

    def report() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return report


def _prompt_texts(tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """Every training sum as (text up to the assistant's turn, answer)."""
    template = tokenizer.apply_chat_template(
        [{"role": "user", "content": "SUM"}], tokenize=False, add_generation_prompt=True
    )
    return [(template.replace("SUM", f"{a}+{b}="), str(a + b)) for a, b in arithmetic.sums(held_out=False)]


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids [N, T], padded on the right, and lengths [N]."""
    batch = tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"].sum(1)


@contextmanager
def _learning(model: nn.Module, *, rate: float, steps: int) -> Iterator[Callable[[Tensor, int], None]]:
    """Yields the function (loss, step) that takes an optimizer step: Muon for the layers' matrices, AdamW for the rest.

    Muon (Jordan et al. 2024) needs a third of AdamW's steps here. The rate warms up, then falls to a tenth (cosine).
    """
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    matrices = [weight for name, weight in named if "layers" in name and weight.ndim == 2]
    others = [weight for name, weight in named if not ("layers" in name and weight.ndim == 2)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]

    def step_with(loss: Tensor, step: int) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_([*matrices, *others], 1.0)
        now = rate * min(1.0, (step + 1) / WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = now
            optimizer.step()
            optimizer.zero_grad()

    model.train()
    yield step_with
    model.eval()


def _train_sums(
    model: Any, tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int, report: Callable[[], None]
) -> None:
    """Next-token loss on the answers only, each digit of which is random with probability `SLIP`.

    The noise enters as its expectation (label smoothing over the ten digits), which learns faster than sampling it.
    A second head, discarded afterwards, predicts the token just read: otherwise the last layer forgets it, and a
    reward model on top could not compare what is written with what was expected.
    """
    rng = random.Random(seed)
    examples = _prompt_texts(tokenizer)
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list(DIGITS)))
    reader = _seeded(seed, lambda: nn.Linear(model.config.hidden_size, len(tokenizer)))
    with _learning(nn.ModuleList([model, reader]), rate=ADDING_RATE, steps=steps) as step_with:
        for step in range(steps):
            chosen = rng.choices(examples, k=SUMS_PER_STEP)
            ids, lengths = _encode(tokenizer, [prompt + answer + TURN_END for prompt, answer in chosen])
            position = torch.arange(ids.shape[1] - 1)
            answer_lengths = torch.tensor([len(answer) + 1 for _, answer in chosen])  # one token per digit, and the end
            last = (lengths - 1)[:, None]
            trained = (position < last) & (position >= last - answer_lengths[:, None])
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][trained]
            logprobs = model.lm_head(hidden).log_softmax(-1)  # [tokens, V]
            target = ids[:, 1:][trained]
            right = logprobs.gather(1, target[:, None])[:, 0]
            slipped = torch.where(torch.isin(target, digits), logprobs[:, digits].mean(-1), right)
            reading = functional.cross_entropy(reader(hidden), ids[:, :-1][trained])
            step_with(-((1 - SLIP) * right + SLIP * slipped).mean() + READING * reading, step)
            report()


def _train_preferences(
    model: Any, tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int, report: Callable[[], None]
) -> None:
    rng = random.Random(seed)
    examples = _prompt_texts(tokenizer)
    with _learning(model, rate=JUDGING_RATE, steps=steps) as step_with:
        for step in range(steps):
            wrong = arithmetic.wrong_answer if step % 3 == 0 else arithmetic.near_miss
            chosen = rng.choices(examples, k=JUDGED_PER_STEP)
            texts = [prompt + answer for prompt, answer in chosen]
            texts += [prompt + wrong(answer, rng) for _ in range(WRONG_PER_SUM) for prompt, answer in chosen]
            ids, lengths = _encode(tokenizer, [text + TURN_END + "\n" for text in texts])
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            step_with(_preference_loss(model.score(hidden)[..., 0], ids, lengths, right=len(chosen)), step)
            report()


def _preference_loss(scores: Tensor, ids: Tensor, lengths: Tensor, *, right: int) -> Tensor:
    """Bradley–Terry, final and token by token, plus centering.

    `scores`, `ids` [N, T] and `lengths` [N] hold the `right` answers first, then one or more rounds of wrong ones.
    """
    rounds = len(ids) // right - 1
    final = scores.gather(1, lengths[:, None] - 1)[:, 0]
    chosen, rejected = final[:right].repeat(rounds), final[right:]
    loss = -functional.logsigmoid(chosen - rejected).mean() + CENTER * (chosen + rejected).square().mean()
    shorter = torch.minimum(lengths[:right].repeat(rounds), lengths[right:])
    differ = (ids[:right].repeat(rounds, 1) != ids[right:]).cumsum(1) > 0
    differ &= torch.arange(ids.shape[1]) < shorter[:, None]
    margins = scores[:right].repeat(rounds, 1) - scores[right:]
    return loss - functional.logsigmoid(margins[differ]).mean()
