"""What a run's prompts files hold that a plan must know: usable prompts and everything that is wrong with them.

A report is computed once per content, tokenizer and options, and kept beside the runs
(`cluster/runs/prompts_cache.py`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from cluster.config.run import RunConfig
from cluster.runs.prompts_cache import KnownLengths, PromptsCache, code_digest, key_of, tokenizer_digest
from trainers.config import Config
from trainers.data.chat import ChatEncoder, limit_lengths
from trainers.data.reader import open_prompts
from trainers.data.source import UnreadableError, as_entries, expand
from trainers.errors import Problem, UserError
from trainers.types import Prompt

_LAYOUT: Final = 1  # of a stored report


class PromptsReport(Config):
    """One of `data.prompts` and `data.eval_prompts`."""

    usable: int | None
    """Prompts that a run can use; None: it would refuse the files."""
    problems: tuple[Problem, ...] = ()
    """Everything wrong with the files."""


def prompts_problems(config: RunConfig, *, tokenize: bool) -> tuple[int | None, list[Problem]]:
    """Usable prompts to train on, if there are any, and everything wrong with a config's prompts files.

    Without `tokenize` (no policy can be read) their lengths are not checked.
    """
    reports, data = _Reports(config, tokenize=tokenize), config.data
    held_out = [] if data.eval_prompts is None else reports.of(data.eval_prompts).problems
    learner = config.algorithm.type if config.learns_from_data else None
    train = reports.of(data.prompts, responses_for=learner)
    return train.usable, [*reports.encoder_problems, *held_out, *train.problems]


class _Reports:
    """The reports of one config."""

    def __init__(self, config: RunConfig, *, tokenize: bool) -> None:
        self._config = config
        self._cache = PromptsCache(Path(config.root))
        policy = config.policy
        self._tokenizer = tokenizer_digest(policy.model, policy.chat_template) if tokenize else None
        self._tokenize = tokenize
        self.encoder_problems: tuple[Problem, ...] = ()

    @cached_property
    def _encoder(self) -> ChatEncoder | None:
        policy = self._config.policy
        try:
            return ChatEncoder.load(policy.model, chat_template=policy.chat_template)
        except UserError as error:
            self.encoder_problems = error.problems
            return None

    def of(self, paths: str | Sequence[str], *, responses_for: str | None = None) -> PromptsReport:
        """The report on one key of `data`; with `responses_for`, an algorithm, each record must have a response."""
        key = self._key(paths, responses_for)
        if key is None:
            return self._computed(paths, responses_for)
        if (known := self._cache.read("report", key)) is not None:
            try:
                return PromptsReport.model_validate_json(known)
            except ValidationError:
                pass  # of another layout
        report = self._computed(paths, responses_for)
        if key == self._key(paths, responses_for) and not self.encoder_problems:  # nothing changed while it was read
            self._cache.write("report", key, report.model_dump_json().encode())
        return report

    def _key(self, paths: str | Sequence[str], responses_for: str | None) -> str | None:
        """None if a file's content cannot be identified, or the tokenizer's files are not here."""
        if self._tokenize and self._tokenizer is None:
            return None
        try:
            entries = [[(file, self._cache.content_digest(file)) for file in expand(e)] for e in as_entries(paths)]
        except UnreadableError:
            return None
        if any(digest is None for entry in entries for _, digest in entry):
            return None
        data = self._config.data
        options = data.model_dump(include={"max_prompt_tokens", "overlong", "skip_invalid", "strip_responses"})
        return key_of([_LAYOUT, code_digest(), self._tokenizer, entries, options, responses_for])

    def _computed(self, paths: str | Sequence[str], responses_for: str | None) -> PromptsReport:
        data = self._config.data
        encoder = self._encoder if self._tokenize else None
        memory = None if self._tokenizer is None else KnownLengths(self._cache, self._tokenizer)
        try:
            with tempfile.TemporaryDirectory() as folder:
                prompts = open_prompts(
                    paths,
                    skip_invalid=data.skip_invalid,
                    strip_responses=data.strip_responses,
                    rejected=Path(folder) / "rejected.jsonl",
                )
            if encoder is not None:
                limit, overlong = data.max_prompt_tokens, data.overlong
                prompts, _ = limit_lengths(prompts, encoder, max_tokens=limit, overlong=overlong, memory=memory)
        except UserError as error:
            return PromptsReport(usable=None, problems=error.problems)
        problems = [] if responses_for is None else _response_problems(prompts, responses_for)
        return PromptsReport(usable=len(prompts), problems=tuple(problems))


def _response_problems(prompts: Iterable[Prompt], algorithm: str) -> list[Problem]:
    """Whether every record of the data has a response to learn from."""
    without = (prompt for prompt in prompts if prompt.response is None)
    first = next(without, None)
    if first is None:
        return []
    others = sum(1 for _ in without)
    more = f", nor do {others} other record{'' if others == 1 else 's'}" if others else ""
    message = (
        f"holds no response{more}; {algorithm} learns from the data's responses (data.strip_responses) in the steps "
        "that the policy does not write: give each record one, or set algorithm.lmbda: 1, or let the teacher write "
        "with data.strip_responses: false"
    )
    return [Problem(f"{first.source}:{first.line}", message)]
