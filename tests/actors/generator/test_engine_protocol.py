"""The generator over an engine that is not vLLM: it needs the protocol only, and keeps its order of calls."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
import pytest

from actors.config import GeneratorConfig
from actors.generator.actor import Generator
from actors.generator.engine import Engine
from actors.messages import EngineSpec, GenerateRequest, TopLogprobsRequest
from trainers.config import SamplingConfig
from trainers.types import Completion, TopLogprobs

_T = TypeVar("_T")
SPEC = EngineSpec(model="toy", dtype="float32", generators=GeneratorConfig(), max_model_len=8)
REQUEST = GenerateRequest(id="g", prompt=np.array([1], dtype=np.int32), sampling=SamplingConfig(), seeds=(5, 6))


def done(value: _T) -> Future[_T]:
    future: Future[_T] = Future()
    future.set_result(value)
    return future


class ToyEngine:
    """Implements `Engine`: writes its seed; remembers what it was asked, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.version = -1
        self.waiting: list[tuple[int, Future[Completion]]] = []
        self.paused = False

    @property
    def ready(self) -> Future[None]:
        return done(None)

    def draw(self, request: GenerateRequest) -> list[Future[Completion]]:
        futures: list[Future[Completion]] = [Future() for _ in request.seeds]
        self.waiting += zip(request.seeds, futures, strict=True)
        self._write()
        return futures

    def top_logprobs(self, request: TopLogprobsRequest) -> Future[TopLogprobs]:
        shape = (len(request.places), request.top_k)
        return done(TopLogprobs(np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float32)))

    def pause(self) -> Future[None]:
        self.paused = True
        return self._note("pause")

    def resume(self, policy_version: int) -> Future[None]:
        self.paused, self.version = False, policy_version
        self._write()
        return self._note(f"resume {policy_version}")

    def sleep(self) -> Future[None]:
        return self._note("sleep")

    def wake_up(self) -> Future[None]:
        return self._note("wake up")

    def init_transfer(self, info: dict[str, Any]) -> Future[Any]:
        return self._note("init")

    def start_update(self) -> Future[Any]:
        return self._note("start")

    def load_weights(self, chunk: dict[str, Any]) -> Future[Any]:
        return self._note(f"load {chunk['name']}")

    def finish_update(self) -> Future[Any]:
        return self._note("finish")

    def loaded_digests(self) -> Future[list[dict[str, str]]]:
        return done([{"w": "1"}])

    def use_adapter(self, id: int, directory: str) -> Future[None]:
        return self._note(f"adapter {id}")

    def close(self) -> None:
        self.asked.append("close")

    def _note(self, what: str) -> Future[None]:
        self.asked.append(what)
        return done(None)

    def _write(self) -> None:
        while self.waiting and not self.paused:
            seed, future = self.waiting.pop(0)
            tokens = np.array([seed], dtype=np.int32)
            future.set_result(
                Completion(
                    tokens=tokens,
                    logprobs=np.zeros(1, dtype=np.float32),
                    text=str(seed),
                    finish_reason="stop",
                    policy_version=self.version,
                )
            )


@pytest.fixture
async def toy() -> tuple[Generator, ToyEngine]:
    engine = ToyEngine()

    def make(spec: EngineSpec) -> Engine:
        assert spec is SPEC
        return engine

    generator = Generator(SPEC, make_engine=make)
    await generator.start()
    return generator, engine


async def test_nothing_is_written_before_weights_have_a_version(toy: tuple[Generator, ToyEngine]) -> None:
    generator, _ = toy
    asked = asyncio.create_task(generator.generate(REQUEST))
    await asyncio.sleep(0)
    assert not asked.done()
    await generator.resume(3)
    assert [(c.text, c.policy_version) for c in await asked] == [("5", 3), ("6", 3)]


async def test_weights_arrive_while_generation_is_paused(toy: tuple[Generator, ToyEngine]) -> None:
    generator, engine = toy
    engine.asked.clear()
    await generator.init_weight_transfer({})
    await generator.start_weight_update()
    await generator.update_weights({"name": "a"})
    await generator.update_weights({"name": "b"})
    await generator.finish_weight_update()
    assert await generator.received_digests() == [{"w": "1"}]
    await generator.resume(1)
    assert engine.asked == ["init", "pause", "start", "load a", "load b", "finish", "resume 1"]


async def test_it_sleeps_only_when_it_is_paused(toy: tuple[Generator, ToyEngine]) -> None:
    generator, engine = toy
    engine.asked.clear()
    await generator.sleep()
    await generator.wake_up()
    await generator.close()
    assert engine.asked == ["pause", "sleep", "wake up", "close"]


def test_the_generator_is_imported_without_an_engine() -> None:
    code = "import sys, actors.generator.actor, actors.generator.engine; print('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
