"""A run from its config to its end: which directory, which cluster, how it ended, and nothing left behind.

It owns what must be given back however a run ends: the Ray instance (where it started one) and the run's lock; the
roles clean up after themselves (`roles.py`). The named boundary where every failure is recorded is here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from rich.console import Console

from actors.modeling.policy_source import Origin, find_origin
from actors.runtime.actor_group import RoleError, peak_memory
from actors.runtime.patient_ray import patient_ray
from actors.runtime.scratch_folder import scratch_folder
from cluster.config.run import RunConfig
from cluster.models.engine_limits import engine_problems
from cluster.models.inspect import read_model
from cluster.models.remote import addresses, fetched
from cluster.runs.adalora_ranks import read_ranks
from cluster.runs.checkpoint import Checkpoint, CheckpointStore
from cluster.runs.daemon_threads import run_within, start
from cluster.runs.directory import RunDirectory, RunError
from cluster.runs.prompts_cache import PromptsCache, known_lengths
from cluster.runs.recorder import Recorder
from cluster.runs.resume import find_resumable, resume_differences
from cluster.training.driver import Data, Driver, Interrupted, Sinks
from cluster.training.progress import Progress, make_progress
from cluster.training.recording import Recording
from cluster.training.roles import RunningRoles, open_roles
from cluster.training.run_spec import derive_spec
from trainers.algorithms.catalog import make_algorithm
from trainers.data.chat import ChatEncoder, limit_lengths
from trainers.data.reader import PromptSet, open_prompts
from trainers.data.stream import PromptStream
from trainers.errors import UserError

_T = TypeVar("_T")

DONE, FAILED, INTERRUPTED = 0, 1, 130
_LEAST_FREE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended, for the caller to report."""

    run: RunDirectory
    exit_code: int
    seconds: Mapping[str, float]  # of each phase
    peak_memory: Mapping[str, int]  # bytes, of each process that ended well


def train(
    config: RunConfig,
    *,
    resume: str = "auto",
    console: Console | None = None,
    spent: Mapping[str, float] | None = None,
    python: str | None = None,
) -> Outcome:
    """Train to the end, an interruption or a failure. Raises UserError for what the user can fix.

    `spent`: seconds of what came before, by name. `python`: what Ray starts its workers with
    (`preloading.py`).
    """
    run, resumed = choose_run(config, resume)
    progress = Recording(make_progress(console or Console()), run, spent=spent)
    memory: dict[str, int] = {}
    try:
        with run.locked():
            if resumed:  # only now: until the lock is held, another process may be running this run
                run.write_config(config)
                run.update(steps=config.train.steps)
            run.check_space(_LEAST_FREE_BYTES)
            run.update(state="running", error=None)
            progress.note(f"run {run.path}" + (" (resumed)" if resumed else ""))
            code = _attempt(config, run, progress, memory, python)
    finally:
        progress.close()
    return Outcome(run, code, progress.seconds, memory)


def choose_run(config: RunConfig, resume: str) -> tuple[RunDirectory, bool]:
    """The run to work in, and whether it is resumed: `auto` (the newest that fits), `never`, or a run's directory.

    A run that exists is only read.
    """
    root = Path(config.root).resolve()  # roles on other nodes write there too
    if resume == "never":
        return RunDirectory.create(root, config.name, config), False
    if resume == "auto":
        found = find_resumable(root, config)
        return (RunDirectory.create(root, config.name, config), False) if found is None else (found, True)
    found = RunDirectory.open(Path(resume))
    if differences := resume_differences(found.config(), config):
        raise UserError(differences)
    return found, True


def _attempt(
    config: RunConfig, run: RunDirectory, progress: Recording, memory: dict[str, int], python: str | None
) -> int:
    """Run, and record how it ended. The named boundary: every failure becomes `run.json`'s error.

    Raises UserError for what the user can fix, wherever it was found.
    """
    try:
        if addresses(config):
            progress.phase("fetch models")
        with termination_interrupts():
            here = fetched(config, run, note=progress.note)
        progress.phase("start Ray")
        with ray_cluster(python) as own:
            asyncio.run(_run(here, run, progress, memory, own_cluster=own))
    except Interrupted as stopped:
        run.update(state="stopped", step=stopped.step)
        progress.note(f"Stopped after step {stopped.step}. Re-run the same command to resume.")
        return INTERRUPTED
    except (asyncio.CancelledError, KeyboardInterrupt):  # asked twice, or before the first step could begin
        run.update(state="stopped")
        progress.note("Stopped. Re-run the same command to resume from the last checkpoint (if any).")
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the named boundary: recorded in run.json and shown
        causes = flattened(error)
        cause = recorded_error(causes[0], phase=progress.current)
        record_failure(run, cause, progress)
        if isinstance(causes[0], UserError):
            raise UserError([p for e in causes if isinstance(e, UserError) for p in e.problems]) from None
        progress.note(f"failed: {describe(cause)}")
        return FAILED
    run.update(state="succeeded", peak_memory=memory)
    progress.note(f"done: the trained model is in {run.model}")
    return DONE


def record_failure(run: RunDirectory, cause: RunError, progress: Progress, *, within_s: float = 60.0) -> None:
    """Write why a run failed to `run.json`; a hung file system, which may be the cause, does not hold up the end."""
    try:
        start(partial(run.update, state="failed", error=cause)).result(timeout=within_s)
    except TimeoutError:
        progress.note(f"{run.path / 'run.json'} could not be written within {within_s:g} s; is its file system hung?")


def flattened(error: BaseException) -> list[BaseException]:
    """What groups of exceptions hold, the first failure first.

    >>> flattened(ExceptionGroup("tasks", [ValueError("a"), ExceptionGroup("more", [KeyError("b")])]))
    [ValueError('a'), KeyError('b')]
    """
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in flattened(inner)]
    return [error]


def recorded_error(error: BaseException, *, phase: str) -> RunError:
    """A failure in the form that `run.json` keeps; a role knows its own phase, all else failed in the run's."""
    if isinstance(error, RoleError):
        return RunError(
            role=error.role, rank=error.rank, phase=error.phase, type=error.kind, message=error.message, log=error.log
        )
    return RunError(role="driver", phase=phase, type=type(error).__name__, message=str(error) or "(no message)")


def describe(error: RunError) -> str:
    """The cause in one or two lines for a person."""
    rank = "" if error.rank is None else f" {error.rank}"
    log = f"\n  log: {error.log}" if error.log else ""
    return f"{error.role}{rank}, {error.phase}: {error.type}: {error.message}{log}"


@contextmanager
def ray_cluster(python: str | None = None) -> Iterator[bool]:
    """The cluster at RAY_ADDRESS, or one of our own on this machine that ends with the run: True if so.

    `python`: what workers are started with, if not Python (`preloading.py`).
    """
    if ray.is_initialized():
        yield False
        return
    runtime_env: dict[str, Any] = {"env_vars": {"RAY_USAGE_STATS_ENABLED": "0"}}
    if python is not None:
        runtime_env["py_executable"] = python
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=runtime_env)
        with _connected():
            yield False
        return
    home = Path(os.environ.get("RAY_TMPDIR") or "/tmp")  # not TMPDIR: the paths of sockets must stay short
    with scratch_folder("rlhf-ray-", home) as folder:
        with patient_ray():
            ray.init(
                address="local",
                num_cpus=max(len(os.sched_getaffinity(0)), 16),  # logical: the roles set their threads themselves
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
                runtime_env=runtime_env,
                _system_config={"prestart_worker_first_driver": False},  # workers that no role could use
            )
        with _connected():
            yield True


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """Before there is a loop, a termination ends the run as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refuse_what_engines_cannot(origin: Origin, *, gpus: bool) -> None:
    """Again, now that it is known whether the cluster has GPUs."""
    model = read_model(origin.policy.model, where="policy.model")
    if problems := engine_problems(model, origin.policy, gpus=gpus):
        raise UserError(problems)


async def _run(
    config: RunConfig,
    run: RunDirectory,
    progress: Recording,
    memory: dict[str, int],
    *,
    own_cluster: bool,
) -> None:
    """`config`: every model is here."""
    ending_on_termination()
    progress.phase("read prompts")
    data = open_data(config, run)
    progress.phase("find checkpoint")
    checkpoints = CheckpointStore(run.checkpoints, config.checkpoint.keep)
    checkpoint = await _read(config, checkpoints.latest)
    progress.phase("start roles")
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    origin = find_origin(config.policy)
    _refuse_what_engines_cannot(origin, gpus=gpus)
    spec = derive_spec(config, origin, run, gpus=gpus)
    with Recorder(run.path, sinks=config.logging.sinks) as recorder:
        async with open_roles(spec, data, progress=progress, own_cluster=own_cluster) as roles:
            driver = Driver(
                config,
                roles,
                data,
                Sinks(recorder=recorder, checkpoints=checkpoints, progress=progress),
                algorithm=make_algorithm(config.algorithm, config.train),
            )
            with stopping_on_signals(driver):
                if checkpoint is not None:
                    progress.phase("load checkpoint")
                await _restore(config, driver, checkpoints, checkpoint, recorder)
                progress.start(steps=config.train.steps, done=driver.step)
                await driver.run()
            progress.phase("export")
            await export(roles, run)
            if ranks := read_ranks(run.model):
                progress.note("\n".join(["the adapter's ranks:", *ranks.lines()]))
            memory |= await roles.peak_memory()
    memory["driver"] = peak_memory()


async def _read(config: RunConfig, work: Callable[[], _T]) -> _T:
    return await run_within(work, save_s=config.timeouts.save_s, late="the newest checkpoint was not read")


async def _restore(
    config: RunConfig,
    driver: Driver,
    checkpoints: CheckpointStore,
    checkpoint: Checkpoint | None,
    recorder: Recorder,
) -> None:
    if checkpoint is None:
        recorder.truncate_after(-1)
        return
    state = await _read(config, partial(checkpoints.load_state, checkpoint.path))
    await driver.restore(checkpoint, state)
    checkpoints.discard_after(checkpoint.step)
    recorder.truncate_after(checkpoint.step)


def open_data(config: RunConfig, run: RunDirectory) -> Data:
    """Prompts, read and checked; those that do not fit are refused, or left out and counted, as configured."""
    data = config.data
    policy = config.policy
    encoder = ChatEncoder.load(policy.model, chat_template=policy.chat_template)
    memory = known_lengths(PromptsCache(run.path.parent), policy.model, policy.chat_template)

    def prompts(paths: str | list[str]) -> PromptSet:
        found = open_prompts(
            paths, skip_invalid=data.skip_invalid, strip_responses=data.strip_responses, rejected=run.rejected
        )
        limit, overlong = data.max_prompt_tokens, data.overlong
        return limit_lengths(found, encoder, max_tokens=limit, overlong=overlong, memory=memory)[0]

    stream = PromptStream(prompts(data.prompts), seed=config.seed, shuffle=data.shuffle, weights=data.weights)
    eval_prompts = prompts(data.eval_prompts) if data.eval_prompts else ()
    return Data(stream=stream, eval_prompts=eval_prompts, encoder=encoder)


async def export(roles: RunningRoles, run: RunDirectory) -> None:
    """The trained model in Hugging Face format, complete or not at all."""
    partial = run.path / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    await roles.learners.export(str(partial))
    shutil.rmtree(run.model, ignore_errors=True)
    partial.rename(run.model)


@contextmanager
def stopping_on_signals(driver: Driver) -> Iterator[None]:
    """Ctrl-C or a termination asks the driver to stop; a second one ends at once."""
    loop = asyncio.get_running_loop()
    asked = 0
    main = asyncio.current_task()

    def stop() -> None:
        nonlocal asked
        asked += 1
        driver.stop()
        if asked > 1 and main is not None:
            main.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        ending_on_termination()


def ending_on_termination() -> None:
    """If there is no loop to stop, a termination ends the run as Ctrl-C does: at once, with everything released."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
