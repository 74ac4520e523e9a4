"""`rlhf export`: a run's adapter merged into its base, as one complete model, with the error that this makes.

It knows the run's directory; torch is imported by what merges, once nothing is left to refuse.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from actors.modeling.policy_source import find_origin
from cluster.config.run import RunConfig, parse_config
from cluster.models.inspect import read_model
from cluster.models.remote import as_run
from cluster.runs.atomic_files import free_bytes, write_atomic
from cluster.runs.directory import RunDirectory
from trainers.errors import Problem, UserError
from trainers.types import Int32Array

MEASURED = 8  # recorded samples on which the error is measured
_PLAIN = "lora"  # in model/: the plain LoRA adapter that computes the same as an AdaLoRA one


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What `export.json` tells of a merged model."""

    run: str
    train_type: str
    base: str
    adapter: str
    dtype: str
    samples: int  # recorded ones, on which the error was measured
    tokens: int  # of these, that were compared
    logprob_error_max: float | None  # nats; None: the run holds no rollouts
    logprob_error_mean: float | None


def export_merged(path: Path, target: Path) -> Export:
    """Write the complete model of the run in `path` to the folder `target`; returns what `export.json` there contains.

    UserError, before anything is written, for a run that has no adapter to merge, and for a target that is in use or
    has too little space.
    """
    run = RunDirectory.open(path.resolve())
    config = as_run(parse_config(run.config()), run)
    _require_adapter(run, config)
    policy = find_origin(config.policy).in_run(run.merged)
    base = str(run.base) if run.base.is_dir() else policy.model
    _require_room(target, base, config)
    plain = run.model / _PLAIN
    adapter = plain if config.policy.train_type == "adalora" else run.model
    sequences = recorded_sequences(run)

    from safetensors import SafetensorError
    from transformers import AutoTokenizer  # seconds to import, as is what follows

    from actors.modeling.export import merge_adapter

    partial = target.absolute().with_name(f".{target.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        error = merge_adapter(base, adapter, partial, dtype=config.policy.dtype, sequences=sequences)
        AutoTokenizer.from_pretrained(run.model).save_pretrained(partial)  # with the run's chat template
        export = Export(
            run=run.path.name,
            train_type=config.policy.train_type,
            base=base,
            adapter=str(adapter),
            dtype=config.policy.dtype,
            samples=len(sequences),
            tokens=error.tokens if error else 0,
            logprob_error_max=error.max if error else None,
            logprob_error_mean=error.mean if error else None,
        )
        write_atomic(partial / "export.json", json.dumps(asdict(export), indent=2) + "\n")
        partial.rename(target)
    except (OSError, ValueError, SafetensorError) as cause:
        message = f"could not be merged and written to {target}: {str(cause).strip() or type(cause).__name__}"
        raise UserError([Problem(run.path.name, message)]) from cause
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return export


def describe(export: Export, target: Path) -> str:
    """What was written, for a person."""
    written = f"{target}: {export.base} with the adapter of {export.run} merged into it, in {export.dtype}"
    if export.logprob_error_max is None:
        return f"{written}\nits error was not measured: the run holds no rollouts to measure it on"
    return (
        f"{written}\nlog-probabilities of {export.tokens} tokens in {export.samples} recorded samples differ from "
        f"those of base and adapter apart by {export.logprob_error_max:.3g} at most, "
        f"{export.logprob_error_mean:.3g} on average"
    )


def recorded_sequences(run: RunDirectory) -> list[Int32Array]:
    """Prompt and completion, one sample of each group, of the newest rollouts that the run recorded."""
    files = sorted(run.rollouts.glob("*.parquet"), key=lambda file: int(file.stem.rpartition("-")[2]))
    if not files:
        return []
    table = pq.read_table(files[-1], columns=["group", "prompt_tokens", "tokens"])
    first: dict[int, int] = {}
    for index, group in enumerate(table.column("group").to_pylist()):
        first.setdefault(group, index)
    rows = table.take(list(first.values())[:MEASURED])  # the others' tokens are never Python objects
    prompts, completions = (rows.column(name).to_pylist() for name in ("prompt_tokens", "tokens"))
    return [np.asarray(p + c, dtype=np.int32) for p, c in zip(prompts, completions, strict=True)]


def _require_adapter(run: RunDirectory, config: RunConfig) -> None:
    record = run.record()
    if record.state != "succeeded" or not run.model.is_dir():
        message = f"is {record.state} after step {record.step} of {record.steps}; a run has a model once it is done"
        raise UserError([Problem(run.path.name, message)])
    if config.policy.train_type == "full":
        message = f"was trained in full, so there is nothing to merge: {run.model} is the complete model"
        raise UserError([Problem(run.path.name, message)])
    if config.policy.train_type == "qlora" and not run.base.is_dir():
        message = "is gone; the adapter was trained on these de-quantized weights and fits no others"
        raise UserError([Problem(str(run.base), message)])


def _require_room(target: Path, base: str, config: RunConfig) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError([Problem("--merged", f"{target} is in use; give a folder that is empty or does not exist yet")])
    parameters = read_model(base, where="policy.model").parameters or 0
    require_space(target, parameters * (4 if config.policy.dtype == "float32" else 2))


def require_space(target: Path, needed: int) -> None:
    """UserError where fewer bytes are free than the model has."""
    if (free := free_bytes(target)) < needed:
        sizes = f"{needed / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} MiB are free"
        raise UserError(
            [Problem("--merged", f"too little space at {target}: {sizes}; free some, or give another folder")]
        )
