"""The vLLM engine, in this file alone: built, fed, stepped by a thread of the actor's process.

One thread owns the engine and does nothing else: it takes commands between two engine steps (add a request, run a
function such as a weight update) and steps while requests are unfinished and generation is not paused. The same
path serves CPUs (in process, no worker processes) and GPUs (tensor parallel workers where asked for).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import torch.distributed as dist
from vllm import EngineArgs, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.exceptions import VLLMClientError
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from actors.config import LARGEST_RANK
from actors.messages import EngineSpec, GenerateRequest, TopLogprobsRequest
from trainers.config import SamplingConfig
from trainers.types import Completion, FinishReason, Int32Array, TopLogprobs

_T = TypeVar("_T")
_RANKS = (8, 16, 32, 64, 128, 256, 320, LARGEST_RANK)  # of adapters, for which vLLM reserves room
_PREFILL_TOKENS = 8192  # of complete prompts in one engine step on the CPU
_Command: TypeAlias = tuple[Callable[[], None], Sequence[Future[Any]]]  # and who waits for it


class _EngineThread:
    """The thread that owns the engine. All methods may be called from any thread; results are futures.

    After an engine step has raised, every pending and later call fails with that exception; after `close` likewise.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._pending: dict[str, _Asked] = {}
        self._paused = False
        self._policy_version = -1
        self._adapter: LoRARequest | None = None
        self._failure: BaseException | None = None
        self._failing = threading.Lock()  # no command may slip in behind the last
        self._engine: Any = None
        self._ready: Future[None] = Future()
        self._ready.set_running_or_notify_cancel()
        self._thread = threading.Thread(target=self._run, name="vllm-engine", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> Future[None]:
        """Done when the engine is loaded; carries the exception where it could not be."""
        return self._ready

    def call(self, function: Callable[[Any], _T]) -> Future[_T]:
        """Run `function(engine)` between two engine steps."""
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(function(self._engine))
            except BaseException as error:  # noqa: BLE001 - boundary: handed to the caller through the future
                future.set_exception(error)

        self._submit(run, [future])
        return future

    def rpc(self, method: str, *args: Any) -> Future[list[Any]]:
        """Call a method on every worker of the engine, between two steps."""
        return self.call(lambda engine: cast("list[Any]", engine.collective_rpc(method, args=args)))

    def close(self) -> None:
        """Stop the thread and the engine's workers."""
        self._commands.put(None)
        self._thread.join(timeout=30)

    def _submit(self, command: Callable[[], None], futures: Sequence[Future[Any]]) -> None:
        for future in futures:
            future.set_running_or_notify_cancel()  # from now on it cannot be canceled while the engine works on it
        with self._failing:
            if self._failure is None:
                self._commands.put((command, futures))
                return
        _fail(futures, self._failure)

    def _run(self) -> None:
        try:
            self._engine = build_engine(self._spec)
        except BaseException as error:  # noqa: BLE001 - boundary: reported through `ready`
            self._ready.set_exception(error)
            self._end(error)
            return
        self._ready.set_result(None)
        try:
            self._loop()
            self._end(RuntimeError("the engine is closed"))
        except BaseException as error:  # noqa: BLE001 - boundary: every waiting request fails with it
            self._end(error)
        finally:
            self._engine.engine_core.shutdown()

    def _end(self, failure: BaseException) -> None:
        """Tell everyone who waits, and who will."""
        with self._failing:
            self._failure = failure
        _fail([asked.future for asked in self._pending.values()], failure)
        while not self._commands.empty():
            if (queued := self._commands.get()) is not None:
                _fail(queued[1], failure)

    def _loop(self) -> None:
        while True:
            stepping = bool(self._pending) and not self._paused
            try:
                queued = self._commands.get(block=not stepping)
            except queue.Empty:
                for output in self._engine.step():
                    if output.finished:
                        self._pending.pop(output.request_id).answer(output)
                continue
            if queued is None:
                return
            command, futures = queued
            try:
                command()
            except Exception as error:  # noqa: BLE001 - boundary: handed to who waits; the engine has not failed
                _fail(futures, error)

    def _add(self, key: str, tokens: Int32Array, params: SamplingParams, asked: _Asked) -> None:
        try:
            self._engine.add_request(key, {"prompt_token_ids": tokens.tolist()}, params, lora_request=self._adapter)
        except VLLMClientError as error:  # refused, for instance because it is longer than the context
            asked.future.set_exception(ValueError(str(error)))
            return
        except Exception as error:  # noqa: BLE001 - boundary: handed to who waits
            asked.future.set_exception(error)
            return
        self._pending[key] = asked


@dataclass(frozen=True, slots=True)
class _Asked:
    """Who waits for a request, and how its output is read."""

    future: Future[Any]
    read: Callable[[Any], Any]

    def answer(self, output: Any) -> None:
        """Hand over what the output holds, or why it cannot be read; nothing where its group has failed already."""
        if self.future.done():
            return
        try:
            result = self.read(output)
        except Exception as error:  # noqa: BLE001 - boundary: handed to who waits; the engine has not failed
            self.future.set_exception(error)
            return
        self.future.set_result(result)


def _completion(output: Any, *, version: int) -> Completion:
    written = output.outputs[0]
    logprobs = [step[token].logprob for step, token in zip(written.logprobs, written.token_ids, strict=True)]
    return Completion(
        tokens=np.asarray(written.token_ids, dtype=np.int32),
        logprobs=np.asarray(logprobs, dtype=np.float32),
        text=written.text,
        finish_reason=cast("FinishReason", written.finish_reason),
        policy_version=version,
    )


def _top(places: Sequence[Any], k: int) -> TopLogprobs:
    """vLLM gives at each place the likeliest tokens by id, and in addition the one that is there."""
    best = [sorted(place.items(), key=lambda item: item[1].rank)[:k] for place in places]
    return TopLogprobs(
        np.asarray([[id for id, _ in row] for row in best], dtype=np.int32).reshape(len(best), -1),
        np.asarray([[found.logprob for _, found in row] for row in best], dtype=np.float32).reshape(len(best), -1),
    )


def _fail(futures: Sequence[Future[Any]], failure: BaseException) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(failure)


class VllmEngine(_EngineThread):
    """Implements `engine.Engine`."""

    def draw(self, request: GenerateRequest) -> list[Future[Completion]]:
        """Start writing a group, batched with whatever else the engine works on."""
        futures: list[Future[Completion]] = [Future() for _ in request.seeds]

        def add() -> None:
            read = partial(_completion, version=self._policy_version)
            for index, future in enumerate(futures):
                params = sampling_params(request.sampling, seed=request.seeds[index])
                self._add(f"{request.id}/{index}", request.prompt, params, _Asked(future, read))

        self._submit(add, futures)
        return futures

    def top_logprobs(self, request: TopLogprobsRequest) -> Future[TopLogprobs]:
        """Start reading a sequence. Its last token is not read but drawn, which gives the alternatives to it."""
        future: Future[TopLogprobs] = Future()
        k = request.top_k
        params = SamplingParams(
            temperature=1.0, max_tokens=1, logprobs=k, prompt_logprobs=k, output_kind=RequestOutputKind.FINAL_ONLY
        )

        def read(output: Any) -> TopLogprobs:
            found = [*output.prompt_logprobs, output.outputs[0].logprobs[0]]
            return _top([found[place] for place in request.places], k)

        self._submit(lambda: self._add(request.id, request.tokens[:-1], params, _Asked(future, read)), [future])
        return future

    def pause(self) -> Future[None]:
        """Stop stepping; requests keep their place."""

        def stop(engine: Any) -> None:
            del engine
            self._paused = True

        return self.call(stop)

    def resume(self, policy_version: int) -> Future[None]:
        """Continue, with weights of that version; what was cached under older weights is forgotten."""

        def restart(engine: Any) -> None:
            if not engine.reset_prefix_cache(reset_running_requests=True):
                raise RuntimeError("vLLM kept key-value blocks of the old weights in its prefix cache")
            self._policy_version = policy_version
            self._paused = False

        return self.call(restart)

    def sleep(self) -> Future[None]:
        """Leave the GPU: weights to host memory, key-value cache dropped."""
        return self.call(lambda engine: engine.sleep(level=1))

    def wake_up(self) -> Future[None]:
        """Take the GPU back."""
        return self.call(lambda engine: engine.wake_up())

    def init_transfer(self, info: dict[str, Any]) -> Future[list[Any]]:
        """Rendezvous with the sender of weights, if the transport has one."""
        return self.rpc("init_weight_transfer_engine", info)

    def start_update(self) -> Future[list[Any]]:
        """Make ready for new weights of the complete model."""
        return self.rpc("start_weight_update")

    def load_weights(self, chunk: dict[str, Any]) -> Future[list[Any]]:
        """Load one chunk of them."""
        return self.rpc("update_weights", chunk)

    def finish_update(self) -> Future[list[Any]]:
        """Use the new weights from the next token on."""
        return self.rpc("finish_weight_update")

    def loaded_digests(self) -> Future[list[dict[str, str]]]:
        """Digest by name of each tensor that the last update loaded, for each worker of the engine."""
        return self.rpc("received_digests")

    def use_adapter(self, id: int, directory: str) -> Future[None]:
        """Write with the adapter in `directory` from now on, instead of the one before; `id` is used once only."""

        def change(engine: Any) -> None:
            adapter = LoRARequest(lora_name=f"policy-{id}", lora_int_id=id, lora_path=directory)
            if not engine.add_lora(adapter):
                raise RuntimeError(f"vLLM did not load adapter {id}")
            if self._adapter is not None:
                engine.remove_lora(self._adapter.lora_int_id)
            self._adapter = adapter

        return self.call(change)


def sampling_params(sampling: SamplingConfig, *, seed: int) -> SamplingParams:
    """Sampling from the complete tempered distribution, and nothing else."""
    return SamplingParams(
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        stop=list(sampling.stop),
        seed=seed,
        logprobs=0,
        output_kind=RequestOutputKind.FINAL_ONLY,
        watermarking=False,
    )


def build_engine(spec: EngineSpec) -> LLMEngine:
    """An engine for this process's device; log-probabilities are those of the sampled distribution."""
    args = engine_args(spec, on_cpu=current_platform.is_cpu())
    engine = LLMEngine.from_engine_args(args, enable_multiprocessing=False)
    _remove_rendezvous()
    return engine


def engine_args(spec: EngineSpec, *, on_cpu: bool) -> EngineArgs:
    """What the engine is built from."""
    config = spec.generators
    device_args: dict[str, Any] = (
        {
            "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
            # A prompt cut over two engine steps makes vLLM rewind its seeded generator, which CPUs cannot.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(_PREFILL_TOKENS, spec.max_model_len),
        }
        if on_cpu
        else {"gpu_memory_utilization": config.gpu_memory_utilization, "enable_sleep_mode": True}
    )
    return EngineArgs(
        model=spec.model,
        dtype=spec.dtype,
        max_model_len=spec.max_model_len,
        max_num_seqs=config.max_num_seqs,
        tensor_parallel_size=config.tensor_parallel,
        # Left open, vLLM finds the run's placement group and wants to place workers of its own in it. The actor has
        # all of its engine's GPUs, which are those of one node: its workers are processes beside it.
        distributed_executor_backend="uni" if config.tensor_parallel == 1 else "mp",
        enforce_eager=on_cpu or config.enforce_eager,
        enable_prefix_caching=config.prefix_caching,
        logprobs_mode="processed_logprobs",
        max_logprobs=spec.top_logprobs,
        seed=0,
        disable_log_stats=True,
        hf_overrides=_as_trained,
        **device_args,
        **_weight_args(spec),
    )


def _remove_rendezvous() -> None:
    """Remove the file over which a worker in this process has met itself: it would stay when the process is killed."""
    if not dist.is_initialized():
        return
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if (path := getattr(store, "path", None)) is not None:  # one over TCP has none
        Path(path).unlink(missing_ok=True)


def _as_trained(config: Any) -> Any:
    """A model's config such that vLLM computes what transformers, and so the learner, does: in Cohere 2 vLLM takes the
    window without the token itself."""
    if config.model_type == "cohere2" and config.sliding_window:
        config.sliding_window -= 1
    return config


def _weight_args(spec: EngineSpec) -> dict[str, Any]:
    """How new weights come in: into the model itself, or as adapters on it."""
    if spec.adapter is None:
        return {
            "worker_extension_cls": "actors.weights.vllm_transports.WorkerExtension",
            "weight_transfer_config": WeightTransferConfig(backend=f"rlhf_{spec.transport}"),
        }
    rank = spec.adapter.adapter_rank or 0
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_cpu_loras": 2,  # the old one goes when the new one is there
        "max_lora_rank": next(size for size in _RANKS if rank <= size),
    }
