"""The vLLM engine on the CPU: what it writes is the policy's distribution, reproducible, and survives what happens.

The engine runs in the process of `EngineHost` (vLLM changes the process that it is imported in); the functions that
take `host` run there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.messages import EngineSpec, GenerateRequest, TopLogprobsRequest
from actors.weights.transfer import WeightSyncError, compare_digests, pack_chunk, tensor_digest
from tests.support import tiny
from tests.support.engine_host import Engine, EngineHost
from trainers.types import Completion, TopLogprobs

pytestmark = pytest.mark.integration
tiny.by_value(__name__)


def write(host: EngineHost, requests: Sequence[GenerateRequest]) -> list[list[Completion]]:
    return [tiny.results(futures) for futures in [host.engine.draw(request) for request in requests]]


@pytest.fixture
def plain(engine: Engine, untied: Path) -> Engine:
    """The engine of most tests: the untied policy in float32."""
    engine.use(tiny.engine_spec(untied))
    return engine


def gap(model: Any, requests: Sequence[GenerateRequest], groups: Sequence[Sequence[Completion]]) -> float:
    """Largest difference from transformers' log-probabilities."""
    worst = 0.0
    with torch.no_grad():
        for request, group in zip(requests, groups, strict=True):
            for completion in group:
                expected = tiny.plain_logprobs(
                    model, tiny.written(request, completion), temperature=request.sampling.temperature
                )[len(request.prompt) :]
                worst = max(worst, float(np.abs(completion.logprobs - expected.numpy()).max()))
    return worst


def some_requests(*, groups: int = 4, **options: Any) -> list[GenerateRequest]:
    return [
        tiny.group_request(f"g{g}", tiny.prompt_tokens(g, length=3 + 5 * g), range(10 * g, 10 * g + 3), **options)
        for g in range(groups)
    ]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_those_of_the_tempered_distribution(plain: Engine, untied: Path, temperature: float) -> None:
    requests = some_requests(temperature=temperature, max_tokens=12)
    assert gap(tiny.load_plain(untied), requests, plain(write, requests)) < 1e-4


def teach(host: EngineHost, requests: Sequence[TopLogprobsRequest]) -> list[TopLogprobs]:
    return tiny.results([host.engine.top_logprobs(request) for request in requests])


def test_a_teacher_reports_its_likeliest_tokens(engine: Engine, untied: Path) -> None:
    """Of chosen places of sequences of several lengths, the last token among them, up to the full context."""
    spec = replace(tiny.engine_spec(untied), top_logprobs=5)
    engine.use(spec)
    lengths = (2, 9, 30, spec.max_model_len)
    asked = [
        TopLogprobsRequest(
            id=f"t{length}",
            tokens=(tokens := np.resize(tiny.prompt_tokens(length), length).astype(np.int32)),
            places=np.unique([1, length // 2 or 1, len(tokens) - 1]),
            top_k=5,
        )
        for length in lengths
    ]
    model = tiny.load_plain(untied)
    for request, taught in zip(asked, engine(teach, asked), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(request.tokens)[None].long()).logits[0]
        best, ids = logits.log_softmax(-1)[request.places - 1].topk(5)
        np.testing.assert_array_equal(taught.ids, ids)
        np.testing.assert_allclose(taught.logprobs, best, rtol=0, atol=1e-4)


def read_wrongly(host: EngineHost, good: TopLogprobsRequest) -> tuple[str, TopLogprobs]:
    bad = replace(good, id="bad", places=np.array([len(good.tokens) + 3]))
    futures = [host.engine.top_logprobs(bad), host.engine.top_logprobs(good)]
    failure = futures[0].exception(timeout=60)
    return type(failure).__name__, futures[1].result(timeout=60)


def test_an_output_that_cannot_be_read_fails_its_own_request_only(engine: Engine, untied: Path) -> None:
    """At once, not after the deadline of whoever waits."""
    engine.use(replace(tiny.engine_spec(untied), top_logprobs=5))
    tokens = tiny.prompt_tokens(1, length=9)
    good = TopLogprobsRequest(id="good", tokens=tokens, places=np.array([1, 8]), top_k=5)
    failure, answer = engine(read_wrongly, good)
    assert failure == "IndexError"
    assert answer.ids.shape == (2, 5)


def ask_wrongly(host: EngineHost, bad: GenerateRequest, good: GenerateRequest) -> tuple[list[str], int]:
    refused, asked = host.engine.draw(bad), host.engine.draw(good)
    failures = [type(future.exception(timeout=60)).__name__ for future in refused]
    return failures, len(tiny.results(asked))


def test_a_request_that_cannot_be_made_fails_alone(plain: Engine) -> None:
    """Its sampling is refused when it is added, between two steps of the engine."""
    good = some_requests(groups=1, max_tokens=4)[0]
    bad = replace(good, id="bad", sampling=good.sampling.model_copy(update={"temperature": -1.0}))
    failures, written = plain(ask_wrongly, bad, good)
    assert len(set(failures)) == 1
    assert "Error" in failures[0]
    assert written == 3


def test_sampling_follows_the_distribution(plain: Engine, untied: Path) -> None:
    """800 first tokens against the exact probabilities: Pearson's chi-squared over the ten likeliest and the rest."""
    prompt, n = tiny.prompt_tokens(3), 800
    [group] = plain(write, [tiny.group_request("chi", prompt, range(n), temperature=0.7, max_tokens=1)])
    with torch.no_grad():
        logits = tiny.load_plain(untied)(input_ids=torch.tensor(prompt)[None].long()).logits[0, -1]
    probabilities, ids = torch.softmax(logits / 0.7, dim=-1).topk(10)
    counts = [sum(int(c.tokens[0]) == token for c in group) for token in ids.tolist()]
    expected = [n * p for p in probabilities.tolist()]
    counts, expected = [*counts, n - sum(counts)], [*expected, n - sum(expected)]
    statistic = sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))
    assert statistic < 29.6  # chi-squared with 10 degrees of freedom: exceeded once in a thousand


def same(first: Sequence[Completion], second: Sequence[Completion]) -> bool:
    return all(
        np.array_equal(a.tokens, b.tokens) and a.logprobs.tobytes() == b.logprobs.tobytes()
        for a, b in zip(first, second, strict=True)
    )


def test_seeds_decide_whatever_the_batch(plain: Engine) -> None:
    """To the last bit: all at once, in another order, one group at a time, one completion at a time."""
    requests = some_requests(max_tokens=12)
    whole = plain(write, requests)
    order = [2, 0, 3, 1]
    shuffled = plain(write, [requests[i] for i in order])
    assert all(same(shuffled[place], whole[i]) for place, i in enumerate(order))
    for request, group in zip(requests, whole, strict=True):
        assert same(plain(write, [request])[0], group)
    single = tiny.group_request("one", requests[1].prompt, requests[1].seeds[2:], max_tokens=12)
    assert same(plain(write, [single])[0], whole[1][2:])
    assert len({c.tokens.tobytes() for c in whole[0]}) == 3  # other seeds write other things


def test_more_prompt_tokens_than_one_engine_step_takes(plain: Engine) -> None:
    """400 prompts of 41 tokens are twice what one step takes in; none of them may be cut, nor the seeds be felt."""
    prompt = np.resize(tiny.prompt_tokens(0), 41).astype(np.int32)
    requests = [tiny.group_request(f"m{i}", prompt, [7], max_tokens=2) for i in range(400)]
    written = [group[0] for group in plain(write, requests)]
    assert all(c.tokens.tobytes() == written[0].tokens.tobytes() for c in written)


def test_end_of_sequence_is_kept_and_reported(plain: Engine) -> None:
    eos = tiny.make_tokenizer().eos_token_id
    requests = [tiny.group_request("e", tiny.prompt_tokens(0), range(96), temperature=2.0, max_tokens=40)]
    [group] = plain(write, requests)
    for completion in group:
        assert (completion.finish_reason == "stop") == (completion.tokens[-1] == eos)
        assert eos not in completion.tokens[:-1]
        assert len(completion.tokens) == len(completion.logprobs)
        assert completion.finish_reason == "stop" or len(completion.tokens) == 40
    assert {c.finish_reason for c in group} == {"stop", "length"}


def test_stop_strings_end_a_completion(plain: Engine) -> None:
    prompt, tokenizer = tiny.prompt_tokens(5), tiny.make_tokenizer()
    [[free]] = plain(write, [tiny.group_request("free", prompt, [1], max_tokens=30)])
    pieces = [tokenizer.decode([token]) for token in free.tokens]
    at = next(i for i, p in enumerate(pieces) if i > 2 and p.isascii() and p.isprintable() and p not in pieces[:i])
    [[stopped]] = plain(write, [tiny.group_request("stop", prompt, [1], max_tokens=30, stop=(pieces[at],))])
    assert stopped.finish_reason == "stop"
    assert stopped.tokens.tolist() == free.tokens[: at + 1].tolist()
    assert stopped.logprobs.tobytes() == free.logprobs[: at + 1].tobytes()
    assert free.text.startswith(stopped.text)
    assert pieces[at] not in stopped.text


def test_the_context_ends_a_completion_as_length(plain: Engine) -> None:
    prompt = tiny.prompt_tokens(1, length=tiny.CONTEXT - 3)
    [group] = plain(write, [tiny.group_request("edge", prompt, range(4), max_tokens=20)])
    assert {(len(c.tokens), c.finish_reason) for c in group} == {(3, "length")}


def test_a_prompt_beyond_the_context_is_refused_and_the_engine_continues(plain: Engine) -> None:
    def body(host: EngineHost, long: GenerateRequest, short: GenerateRequest) -> tuple[list[Any], list[Any]]:
        refused = host.engine.draw(long)
        fine = host.engine.draw(short)
        return [f.exception(timeout=60) for f in refused], tiny.results(fine)

    long = tiny.group_request("long", tiny.prompt_tokens(1, length=tiny.CONTEXT + 1), [0, 1])
    errors, completions = plain(body, long, tiny.group_request("short", tiny.prompt_tokens(1), [0, 1]))
    assert [type(e) for e in errors] == [ValueError, ValueError]
    assert str(tiny.CONTEXT) in str(errors[0])
    assert len(completions) == 2


def test_nothing_is_written_while_paused(plain: Engine) -> None:
    """Commands are run in order and by the thread that steps: when the second has run, a step would have been."""

    def body(host: EngineHost, request: GenerateRequest) -> tuple[list[bool], list[Completion]]:
        vllm = host.engine
        vllm.pause().result(timeout=60)
        futures = vllm.draw(request)
        done = [any(f.done() for f in futures) for _ in range(20) if vllm.call(lambda _: None).result(60) is None]
        vllm.resume(3).result(timeout=60)
        return done, tiny.results(futures)

    request = tiny.group_request("p", tiny.prompt_tokens(1), [7], max_tokens=1)
    done, paused = plain(body, request)
    assert done == [False] * 20
    [free] = plain(write, [request])
    assert same(paused, free)
    assert free[0].policy_version == 3


def test_a_pause_in_flight_changes_nothing_but_the_version(plain: Engine) -> None:
    """The short request, when it is done, pauses the long one half-way; resuming makes it write what it would have."""

    def body(host: EngineHost, long: GenerateRequest, short: GenerateRequest) -> tuple[bool, Completion, Completion]:
        vllm, paused = host.engine, []
        vllm.resume(4).result(timeout=60)
        vllm.pause().result(timeout=60)
        [future] = vllm.draw(long)
        [other] = vllm.draw(short)
        other.add_done_callback(lambda _: paused.append(vllm.pause()))
        vllm.resume(4).result(timeout=60)
        other.result(timeout=60)
        vllm.call(lambda _: None).result(timeout=60)
        half_way = bool(paused) and not future.done()
        vllm.resume(5).result(timeout=60)
        interrupted = future.result(timeout=60)
        return half_way, interrupted, vllm.draw(long)[0].result(timeout=60)

    long = tiny.group_request("l", tiny.prompt_tokens(1), [3], max_tokens=30)
    half_way, interrupted, free = plain(body, long, tiny.group_request("s", tiny.prompt_tokens(2), [0], max_tokens=5))
    assert half_way
    assert interrupted.tokens.tolist() == free.tokens.tolist()
    np.testing.assert_allclose(interrupted.logprobs, free.logprobs, rtol=0, atol=1e-5)
    assert (interrupted.policy_version, free.policy_version) == (4, 5)  # the oldest weights that wrote any of it


def transfer(host: EngineHost, chunks: Sequence[dict[str, Any]], version: int) -> list[dict[str, str]]:
    engine, host.changed = host.engine, True
    engine.pause().result(timeout=60)
    engine.start_update().result(timeout=60)
    for chunk in chunks:
        engine.load_weights(chunk).result(timeout=60)
    engine.finish_update().result(timeout=60)
    received: list[dict[str, str]] = engine.loaded_digests().result(timeout=60)
    engine.resume(version).result(timeout=60)
    return received


def chunks_of(path: Path, dtype: torch.dtype = torch.float32) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Digests, and the weights in chunks of five tensors."""
    named = [(name, p.detach()) for name, p in tiny.load_plain(path, dtype=dtype).named_parameters()]
    chunks = [pack_chunk(named[i : i + 5]) for i in range(0, len(named), 5)]
    return {name: tensor_digest(tensor) for name, tensor in named}, chunks


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_new_weights_write_after_each_update(
    engine: Engine, tmp_path: Path, head: str, request: pytest.FixtureRequest
) -> None:
    others = [tiny.make_policy(tmp_path / str(seed), tied=head == "tied", seed=seed) for seed in (1, 2)]
    paths = [request.getfixturevalue(head), *others]
    engine.use(tiny.engine_spec(paths[0]))
    requests = some_requests(max_tokens=8)
    before = engine(write, requests)
    assert gap(tiny.load_plain(paths[0]), requests, before) < 1e-4
    assert gap(tiny.load_plain(paths[1]), requests, before) > 0.5  # what the next lines would see
    for version in (1, 2):
        sent, chunks = chunks_of(paths[version])
        assert engine(transfer, chunks, version) == [sent]
        after = engine(write, requests)
        assert gap(tiny.load_plain(paths[version]), requests, after) < 1e-4
        assert {c.policy_version for group in after for c in group} == {version}


def test_a_byte_that_changes_in_transit_is_found_by_name(engine: Engine, untied: Path) -> None:
    engine.use(tiny.engine_spec(untied), any_weights=True)
    sent, chunks = chunks_of(untied)
    victim = chunks[2]["names"][3]
    tampered = chunks[2]["buffers"][3].copy()
    tampered[5] ^= 1
    chunks[2]["buffers"][3] = tampered
    [received] = engine(transfer, chunks, 1)
    with pytest.raises(WeightSyncError, match=f"generator 0 loaded a tensor '{victim}' that differs"):
        compare_digests(sent, received, replica="generator 0")
    [received] = engine(transfer, chunks_of(untied)[1], 2)
    compare_digests(sent, received, replica="generator 0")


def test_a_lost_tensor_is_found_by_name(engine: Engine, untied: Path) -> None:
    engine.use(tiny.engine_spec(untied), any_weights=True)
    sent, chunks = chunks_of(untied)
    victim = chunks[1]["names"][0]
    chunks[1] = {key: values[1:] for key, values in chunks[1].items()}
    [received] = engine(transfer, chunks, 1)
    with pytest.raises(WeightSyncError, match=f"never received tensor '{victim}'"):
        compare_digests(sent, received, replica="generator 0")


def test_bfloat16(engine: Engine, tmp_path: Path) -> None:
    path = tiny.make_policy(tmp_path / "b", tied=False, dtype=torch.bfloat16)
    engine.use(tiny.engine_spec(path, dtype="bfloat16"))
    requests = some_requests()
    first = engine(write, requests)
    assert gap(tiny.load_plain(path, dtype=torch.bfloat16), requests, first) < 0.05
    assert all(same(a, b) for a, b in zip(engine(write, requests[::-1]), first[::-1], strict=True))
    other = tiny.make_policy(tmp_path / "c", tied=False, seed=1, dtype=torch.bfloat16)
    sent, chunks = chunks_of(other, torch.bfloat16)
    assert engine(transfer, chunks, 1) == [sent]
    assert gap(tiny.load_plain(other, dtype=torch.bfloat16), requests, engine(write, requests)) < 0.05


def test_a_cancelled_completion_fails_no_other(plain: Engine) -> None:
    def body(host: EngineHost, request: GenerateRequest) -> list[Completion]:
        futures = host.engine.draw(request)
        futures[0].cancel()
        again = host.engine.draw(replace(request, id="again"))
        return tiny.results([*futures[1:], *again])

    completions = plain(body, tiny.group_request("c", tiny.prompt_tokens(1), range(3)))
    assert same(completions[:2], completions[3:])


def fail(host: EngineHost, request: GenerateRequest) -> list[str]:
    """Break vLLM's next step while requests and commands wait; what each of them gets."""
    host.spoil()
    engine, gate, late = host.engine, threading.Event(), []

    def broken_step() -> None:
        late.extend(engine.draw(replace(request, id="late")))  # comes in while the step runs
        late.append(engine.call(lambda _: None))
        raise RuntimeError("the accelerator is gone")

    def break_it(vllm: Any) -> None:
        gate.wait(60)
        vllm.step = broken_step

    engine.call(break_it)
    waiting = engine.draw(request)
    gate.set()
    told = [str(f.exception(timeout=20)) for f in waiting]
    after = [*engine.draw(request), engine.call(lambda _: None), engine.pause()]
    return told + [str(f.exception(timeout=20)) for f in [*late, *after]]


def test_a_failed_step_fails_everyone_who_waits(plain: Engine) -> None:
    told = plain(fail, tiny.group_request("f", tiny.prompt_tokens(1), range(2)))
    assert told == ["the accelerator is gone"] * 9


def test_closing_fails_who_waits(plain: Engine) -> None:
    def body(host: EngineHost, request: GenerateRequest) -> list[str]:
        host.spoil()
        vllm = host.engine
        vllm.pause().result(timeout=60)
        waiting = vllm.draw(request)
        vllm.close()
        return [type(f.exception(timeout=5)).__name__ for f in [*waiting, vllm.pause()]]

    told = plain(body, tiny.group_request("c", tiny.prompt_tokens(1), range(2)))
    assert len(told) == 3
    assert "NoneType" not in told


def test_a_model_that_cannot_be_loaded_is_reported(engine: Engine, tmp_path: Path) -> None:
    def body(host: EngineHost, spec: EngineSpec) -> list[str]:
        from actors.generator.vllm_engine import VllmEngine

        engine = VllmEngine(spec)
        first = engine.ready.exception(timeout=60)
        return [str(first), str(engine.pause().exception(timeout=5))]

    first, second = engine(body, tiny.engine_spec(tmp_path / "missing"))
    assert "missing" in first
    assert second == first


@pytest.mark.parametrize(("tensor_parallel", "executor"), [(1, "uni"), (2, "mp"), (8, "mp")])
def test_the_workers_of_an_engine_are_its_actors_own(
    engine: Engine, untied: Path, tensor_parallel: int, executor: str
) -> None:
    """Left to choose in a placement group, vLLM takes Ray, which refuses a bundle of more than one GPU."""

    def body(host: EngineHost, spec: EngineSpec) -> list[object]:
        from actors.generator.vllm_engine import engine_args

        found = [engine_args(spec, on_cpu=on_cpu) for on_cpu in (False, True)]
        return [(args.tensor_parallel_size, args.distributed_executor_backend) for args in found]

    spec = tiny.engine_spec(untied)
    spec = replace(spec, generators=spec.generators.model_copy(update={"tensor_parallel": tensor_parallel}))
    assert engine(body, spec) == [(tensor_parallel, executor)] * 2
