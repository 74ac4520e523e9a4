"""The generator as a Ray actor: nothing is written without weights, groups come complete and in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from actors.generator.group import GeneratorGroup
from actors.runtime.actor_group import ActorGroup
from actors.weights.transfer import pack_chunk, tensor_digest
from tests.support import tiny
from tests.support.engine_host import LOADING_S

pytestmark = pytest.mark.integration


@pytest.fixture
def generator(engines: ActorGroup, tied: Path) -> Any:
    """Generating, with any weights."""
    [actor] = engines.actors
    wait(actor.use.remote(tiny.engine_spec(tied), any_weights=True))
    return actor


def wait(ref: Any) -> Any:
    return ray.get(ref, timeout=LOADING_S)


def test_nothing_is_written_before_the_first_weights_and_after_the_end(engines: ActorGroup, tied: Path) -> None:
    """An engine that was just started, and closed."""
    [generator] = engines.actors
    wait(generator.prepare.remote(tiny.engine_spec(tied)))
    tiny.run(GeneratorGroup(engines, tiny.DEADLINES).start())
    waiting = generator.generate.remote(tiny.group_request("early", tiny.prompt_tokens(0), [0, 1], max_tokens=1))
    for _ in range(5):  # answered by the thread that would have written
        assert wait(generator.received_digests.remote()) == [{}]
    assert ray.wait([waiting], timeout=0)[0] == []
    wait(generator.resume.remote(0))
    assert len(wait(waiting)) == 2
    wait(generator.close.remote())
    with pytest.raises(RuntimeError, match="closed"):
        wait(generator.generate.remote(tiny.group_request("late", tiny.prompt_tokens(0), [0])))


def test_groups_come_in_the_order_of_their_seeds(generator: Any) -> None:
    wait(generator.resume.remote(1))
    prompt = tiny.prompt_tokens(1)
    group = wait(generator.generate.remote(tiny.group_request("g", prompt, [5, 6, 7])))
    assert {c.policy_version for c in group} == {1}
    again = [generator.generate.remote(tiny.group_request(f"s{seed}", prompt, [seed])) for seed in (7, 6, 5)]
    for completion, [single] in zip(reversed(group), ray.get(again, timeout=60), strict=True):
        assert np.array_equal(completion.tokens, single.tokens)
        assert completion.text == single.text


def test_text_is_what_the_tokens_say(generator: Any) -> None:
    """But for an unfinished character at the end (a token is a byte here)."""
    tokenizer = tiny.make_tokenizer()
    prompt = np.array(tokenizer("37+48=").input_ids, dtype=np.int32)
    wait(generator.resume.remote(1))
    for completion in wait(generator.generate.remote(tiny.group_request("t", prompt, range(8)))):
        whole = tokenizer.decode(completion.tokens, skip_special_tokens=True)
        assert completion.text.rstrip("�") == whole.rstrip("�")
        assert completion.tokens.dtype == np.int32
        assert completion.logprobs.dtype == np.float32


def test_a_refused_prompt_is_reported_and_the_generator_continues(generator: Any) -> None:
    wait(generator.resume.remote(1))
    long = tiny.prompt_tokens(0, length=tiny.CONTEXT + 5)
    with pytest.raises(ValueError, match=str(tiny.CONTEXT)):
        wait(generator.generate.remote(tiny.group_request("long", long, [0, 1])))
    assert len(wait(generator.generate.remote(tiny.group_request("ok", tiny.prompt_tokens(0), [0])))) == 1


def test_a_weight_update_pauses_until_resume(generator: Any, tied: Path) -> None:
    named = [(name, p.detach().float()) for name, p in tiny.load_plain(tied).named_parameters()]
    wait(generator.start_weight_update.remote())
    waiting = generator.generate.remote(tiny.group_request("during", tiny.prompt_tokens(0), [0], max_tokens=1))
    wait(generator.update_weights.remote(pack_chunk(named)))
    wait(generator.finish_weight_update.remote())
    received = wait(generator.received_digests.remote())
    assert received == [{name: tensor_digest(tensor) for name, tensor in named}]
    assert ray.wait([waiting], timeout=0)[0] == []
    wait(generator.resume.remote(2))
    assert len(wait(waiting)) == 1
