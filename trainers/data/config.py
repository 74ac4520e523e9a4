"""The `data` section of a run's config. It knows the config base only."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from trainers.config import Config


class DataConfig(Config):
    """Which prompts a run trains on, and what it refuses."""

    prompts: str | list[str]
    """Prompt files (.jsonl, .jsonl.gz, .parquet): paths, globs or addresses such as s3://bucket/p.jsonl."""
    eval_prompts: str | list[str] | None = None
    """Prompt files that are only evaluated on, never trained on."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Longest prompt in tokens, chat template included. A longer one is never cut."""
    overlong: Literal["error", "filter"] = "error"
    """What to do with a prompt over `max_prompt_tokens`: refuse the run, or leave the prompt out and count it."""
    skip_invalid: bool = False
    """Write bad lines with their reasons to rejected.jsonl and train on the others, instead of refusing the run."""
    strip_responses: bool = False
    """Use the prompts only of data that holds responses (format `sft`)."""
    shuffle: bool = True
    """A new seeded order each epoch; off: the order of the files."""
    weights: list[float] | None = None
    """Share of each entry of `prompts` in the stream, in any unit; without it every prompt is as likely as another."""

    @model_validator(mode="after")
    def _weights_fit(self) -> DataConfig:
        if self.weights is None:
            return self
        entries = [self.prompts] if isinstance(self.prompts, str) else self.prompts
        if len(self.weights) != len(entries):
            raise ValueError(f"weights: {len(self.weights)} given for {len(entries)} entries of prompts; give one each")
        if not all(math.isfinite(w) and w > 0 for w in self.weights):
            raise ValueError("weights: each must be a finite number above 0; remove a file that must not be used")
        return self
