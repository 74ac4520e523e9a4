"""Prompts to token ids through a model's own chat template, and their lengths against the limit.

It knows transformers' tokenizers (loaded only when a model is named) and Jinja's errors; it knows no model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

import jinja2
import numpy as np
import numpy.typing as npt

from trainers.adapter_folder import tokenizer_source
from trainers.data.findings import SHOWN, Finding, Findings, plural, printable
from trainers.data.reader import PromptFile, PromptSet
from trainers.errors import Problem, UserError
from trainers.types import Prompt

_BATCH = 256
_REFUSED = -1  # in place of a number of tokens
# What templates raise: their own raise_exception, undefined names, and Python's errors from within an expression.
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)


class ChatEncoder:
    """Encodes prompts into tokens as the model expects them; one tokenizer, one template.

    `chat_template` replaces the tokenizer's own. If there is none at all, a prompt of one user turn is its text with
    the tokenizer's special tokens.
    """

    def __init__(self, tokenizer: Any, *, chat_template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = chat_template if chat_template is not None else tokenizer.chat_template

    @classmethod
    def load(cls, model: str, *, chat_template: str | None = None) -> Self:
        """The encoder of a model's or adapter's folder or a hub id. Raises UserError if there is no tokenizer."""
        from transformers import AutoTokenizer  # seconds to import, and only needed here

        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(model))
        except (OSError, ValueError, KeyError, ImportError) as e:
            reason = printable((str(e).strip() or type(e).__name__).splitlines()[0][:300])
            message = f"no tokenizer can be loaded: {reason}; give a folder that holds one, or a model's hub id"
            raise UserError([Problem(model, message)]) from e
        return cls(tokenizer, chat_template=chat_template)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of one prompt, up to where the completion begins. Raises UserError with file and line."""
        encoded = self._encode([prompt])[0]
        if isinstance(encoded, Finding):
            where = f"{prompt.source}:{prompt.line}"
            raise UserError([Problem(where, f"{encoded.field}: found {encoded.found}; expected {encoded.expected}")])
        return encoded

    def lengths(self, prompts: Sequence[Prompt]) -> list[int | Finding]:
        """Tokens of each prompt, or why the template refuses it; a few hundred at once are fast."""
        return [e if isinstance(e, Finding) else len(e) for e in self._encode(prompts)]

    def encode_response(self, text: str) -> list[int]:
        """Token ids of a response, with the end-of-sequence token."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self._tokenizer.eos_token_id]

    def _encode(self, prompts: Sequence[Prompt]) -> list[list[int] | Finding]:
        rendered = [self._render(p) for p in prompts]
        texts = [r for r in rendered if isinstance(r, str)]
        # A template writes its special tokens itself; a bare text gets the tokenizer's.
        special = self._template is None
        ids = iter(self._tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else [])
        return [r if isinstance(r, Finding) else list(next(ids)) for r in rendered]

    def _render(self, prompt: Prompt) -> str | Finding:
        messages = list(prompt.messages)
        if self._template is None:
            if len(messages) == 1 and messages[0]["role"] == "user":
                return str(messages[0]["content"])
            found = f"{plural(len(messages), 'message')}, and a tokenizer without a chat template"
            return Finding("messages", found, "one user turn, or a template (policy.chat_template)")
        try:
            text = self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, add_generation_prompt=True, tokenize=False
            )
        except _TEMPLATE_ERRORS as e:
            reason = printable(str(e).strip() or type(e).__name__)
            return Finding(
                "messages", f"turns that the chat template refuses: {reason[:200]}", "turns that the template accepts"
            )
        return str(text)


@dataclass(slots=True)
class Lengths:
    """Prompt lengths in tokens over a set, gathered in memory that does not grow with it."""

    limit: int
    counts: dict[int, int] = field(default_factory=dict)  # length → prompts; at most limit + 1 keys of interest
    over: int = 0
    refused: int = 0
    longest: int = 0

    def add(self, length: int) -> None:
        """Count one prompt."""
        self.longest = max(self.longest, length)
        self.over += length > self.limit
        capped = min(length, self.limit + 1)
        self.counts[capped] = self.counts.get(capped, 0) + 1

    def histogram(self, bins: int = 10) -> list[tuple[int, int, int]]:
        """(from, to, prompts) in equal bins over 0 … limit, both ends included; those over the limit are not in it."""
        edges = np.unique(np.linspace(0, self.limit, bins + 1).astype(int))
        rows = []
        for low, high in itertools.pairwise(edges.tolist()):
            first = low + (low > 0)
            rows.append((first, high, sum(self.counts.get(n, 0) for n in range(first, high + 1))))
        return rows


class LengthMemory(Protocol):
    """Where the lengths of a file's prompts are kept, so that a file is tokenized once."""

    def recall(self, prompts: PromptFile) -> npt.NDArray[np.int32]:
        """Tokens of the first prompts of a file, as many as are known; -1 for one that the template refuses."""
        ...

    def keep(self, prompts: PromptFile, lengths: npt.NDArray[np.int32], *, complete: bool) -> None:
        """Offer the lengths of the first prompts; asked often, so that what an interruption leaves is not lost."""
        ...


def measure(
    prompts: PromptFile, encoder: ChatEncoder, lengths: Lengths, *, memory: LengthMemory | None = None
) -> Iterator[tuple[int, int, Finding]]:
    """Count every prompt into `lengths`; yields (number, line, finding) for each that is too long or refused."""
    for i, length in _token_counts(prompts, encoder, memory):
        if isinstance(length, Finding):
            lengths.refused += 1
            yield i, prompts.line(i), length
            continue
        lengths.add(length)
        if length > lengths.limit:
            expected = f"at most {lengths.limit:,} (data.max_prompt_tokens; data.overlong: filter leaves it out)"
            yield i, prompts.line(i), Finding("prompt", f"{length:,} tokens", expected)


def _token_counts(
    prompts: PromptFile, encoder: ChatEncoder, memory: LengthMemory | None
) -> Iterator[tuple[int, int | Finding]]:
    """(number, tokens or why the template refuses it) of every prompt; what `memory` knows is not encoded again,
    except for what is refused, whose reason is not kept."""
    counts = np.full(len(prompts), _REFUSED, dtype=np.int32)
    known = 0
    if memory is not None:
        recalled = memory.recall(prompts)[: len(prompts)]
        known = len(recalled)
        counts[:known] = recalled
    for start in range(0, len(prompts), _BATCH):
        numbers = range(start, min(start + _BATCH, len(prompts)))
        asked = [i for i in numbers if i >= known or counts[i] == _REFUSED]
        encoded = dict(zip(asked, encoder.lengths([prompts[i] for i in asked]), strict=True)) if asked else {}
        for i, length in encoded.items():
            counts[i] = _REFUSED if isinstance(length, Finding) else length
        if memory is not None and numbers.stop > known:
            memory.keep(prompts, counts[: numbers.stop], complete=numbers.stop == len(prompts))
        for i in numbers:
            yield i, encoded[i] if i in encoded else int(counts[i])


def limit_lengths(
    prompts: PromptSet,
    encoder: ChatEncoder,
    *,
    max_tokens: int,
    overlong: Literal["error", "filter"],
    memory: LengthMemory | None = None,
) -> tuple[PromptSet, Lengths]:
    """The prompts that fit, and the lengths of all. Never cuts a prompt.

    Raises UserError for prompts that the chat template refuses and, with `overlong="error"`, for those that are too
    long (the first hundred by line, the rest counted); also if none is left.
    """
    lengths, findings = Lengths(max_tokens), Findings()
    problems: list[Problem] = []
    kept: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    for file in prompts.files:
        fits = np.ones(len(file), dtype=np.bool_)
        for i, line, finding in measure(file, encoder, lengths, memory=memory):
            fits[i] = False
            if overlong == "error" or finding.field == "messages":
                findings.add(line, [finding])
                problems += [p.as_problem(file.source) for p in findings.kept[len(problems) :]]
        kept.append(np.flatnonzero(fits))
    if problems:
        rest = findings.errors - len(problems)
        more = [Problem("…", plural(rest, "more problem"))] if rest else []
        raise UserError([*problems[:SHOWN], *more])
    if not any(len(k) for k in kept):
        raise UserError([Problem("data.max_prompt_tokens", f"every prompt is longer than {max_tokens:,}; raise it")])
    return (prompts if lengths.over == 0 else prompts.only(kept)), lengths
