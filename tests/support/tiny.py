"""Tiny policies, prompts and actors for the tests of the roles on the real engines."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from ray.util.placement_group import remove_placement_group
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from actors.config import GeneratorConfig, LearnerConfig, PolicyConfig
from actors.generator.group import generator_seats
from actors.learner.actor import Learner
from actors.learner.group import LearnerGroup, learner_seats
from actors.messages import EngineSpec, GenerateRequest, LearnerSpec
from actors.runtime.actor_group import ActorGroup, Seat, launch
from actors.runtime.layout import Deadlines, Layout
from actors.runtime.placement import reserve
from tests.support.forked_ranks import ForkServer
from trainers.config import SamplingConfig, TrainConfig
from trainers.tiny_models import make_tokenizer
from trainers.types import Completion, Prompt, TokenPrompt

_T = TypeVar("_T")

DEADLINES = Deadlines(start=200, generate=60, update=60, sync=60, save=60)
CONTEXT = 64


def by_value(module: str) -> None:
    """Ray's workers cannot import test modules: what a module defines goes to them as it is."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[module])


by_value(__name__)


def make_policy(path: Path, *, tied: bool, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A Qwen3 of 2 layers with its tokenizer; weights are large enough to make every one of them felt."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        initializer_range=0.15,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def load_plain(path: Path | str, *, dtype: torch.dtype = torch.float64) -> Any:
    """The model as transformers loads it, for the oracles."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def plain_logprobs(model: Any, tokens: np.ndarray[Any, Any], *, temperature: float) -> torch.Tensor:
    """`[T]` log-probabilities of the tokens by the textbook formula, one sequence, no padding; 0 for the first."""
    ids = torch.tensor(np.asarray(tokens), dtype=torch.long)
    logits = model(input_ids=ids[None]).logits[0, :-1]
    chosen = torch.log_softmax(logits.double() / temperature, dim=-1).gather(1, ids[1:, None])[:, 0]
    return torch.cat([chosen.new_zeros(1), chosen])


def engine_spec(model: Path, *, dtype: str = "float32", max_model_len: int = CONTEXT) -> EngineSpec:
    return EngineSpec(
        model=str(model),
        dtype=dtype,
        generators=GeneratorConfig(kv_cache_gib=0.05, max_num_seqs=32, threads=1),
        max_model_len=max_model_len,
    )


def prompt_tokens(seed: int, *, length: int = 7) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(3, 250, length).astype(np.int32)


def token_prompt(name: str, seed: int) -> TokenPrompt:
    prompt = Prompt(messages=({"role": "user", "content": name},), source="test", line=1)
    return TokenPrompt(id=name, prompt=prompt, tokens=prompt_tokens(seed))


def group_request(
    name: str,
    prompt: np.ndarray[Any, Any],
    seeds: Sequence[int],
    *,
    temperature: float = 1.0,
    max_tokens: int = 8,
    **more: Any,
) -> GenerateRequest:
    sampling = SamplingConfig(n=len(seeds), temperature=temperature, max_tokens=max_tokens, **more)
    return GenerateRequest(id=name, prompt=prompt, sampling=sampling, seeds=tuple(seeds))


def written(request: GenerateRequest, completion: Completion) -> np.ndarray[Any, Any]:
    """Prompt and completion as one sequence of tokens."""
    return np.concatenate([request.prompt, completion.tokens])


def results(futures: Sequence[Future[_T]]) -> list[_T]:
    return [f.result(timeout=60) for f in futures]


@contextmanager
def seats(*, learners: int = 0, generators: int = 0, logs: Path) -> Iterator[tuple[list[Seat], list[Seat]]]:
    """Seats of that many generators and learners with one thread each, given back at the end."""
    plan = Layout(
        bundles=[{"CPU": 1.0}] * (generators + learners),
        generators=range(generators),
        learners=range(generators, generators + learners),
        generator_gpus=0.0,
        learner_gpus=0.0,
    )
    group = reserve(plan, deadline_s=30)
    try:
        yield (
            generator_seats(plan, group, GeneratorConfig(threads=1), logs),
            learner_seats(plan, group, LearnerConfig(threads=1), logs),
        )
    finally:
        remove_placement_group(group)


@contextmanager
def learner_group(
    spec: LearnerSpec, logs: Path, *, forks: ForkServer | None = None, cls: type[Learner] = Learner
) -> Iterator[LearnerGroup]:
    """Learners, started: ranks forked by `forks`, or actors on Ray."""
    ranks = ray_ranks(cls, spec, logs) if forks is None else forks.learners(cls, spec, logs)
    with ranks as actors:
        group = LearnerGroup(actors, spec.train, DEADLINES)
        run(group.start())
        yield group


@contextmanager
def ray_ranks(cls: type[Learner], spec: LearnerSpec, logs: Path) -> Iterator[ActorGroup]:
    """A learner for each rank on Ray, not started."""
    workers = spec.learners.workers
    with (
        seats(learners=workers, logs=logs) as (_, taken),
        launched("learner", taken, lambda s, r: launch(cls, s, spec, rank=r, world_size=workers)) as actors,
    ):
        yield actors


@contextmanager
def launched(role: str, taken: Sequence[Seat], make: Callable[[Seat, int], Any]) -> Iterator[ActorGroup]:
    actors = [make(seat, rank) for rank, seat in enumerate(taken)]
    group = ActorGroup(role, actors, [seat.log for seat in taken])
    try:
        yield group
    finally:
        group.kill()


def run(wait: Coroutine[Any, Any, _T]) -> _T:
    """Wait in a test that is not asynchronous itself."""
    return asyncio.run(wait)


def learner_spec(
    model: Path, *, train: TrainConfig, learners: LearnerConfig, algorithm: Any, **more: Any
) -> LearnerSpec:
    fields: dict[str, Any] = {
        "policy": PolicyConfig(model=str(model), dtype="float32"),
        "temperature": 0.7,
        "max_completion_tokens": 16,
        "total_optimizer_steps": 4,
        "critic_optimizer_steps": 4,
        "seed": 0,
        "collective_timeout_s": 60.0,
    }
    return LearnerSpec(train=train, learners=learners, algorithm=algorithm, **(fields | more))
