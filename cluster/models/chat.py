"""`rlhf chat`: talking to a trained model on this machine, beside the model it was trained from.

It knows transformers and PEFT and nothing of runs; weights are read as data, code in a model's folder never runs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, TextIteratorStreamer

from trainers.adapter_folder import find_base, is_adapter, tokenizer_source
from trainers.errors import Problem, UserError
from trainers.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How answers are drawn."""

    max_tokens: int = 512
    temperature: float = 1.0  # 0 = always the likeliest token
    system: str | None = None


class _Stopped(StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """Ends a generation when its reader has gone."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class ChatModel:
    """A causal language model or a PEFT adapter with its base, loaded from a folder or the hub."""

    def __init__(self, name: str) -> None:
        """Loads it; UserError if there is no such model, or it does not generate text."""
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(name))
            self.model = _load(name).eval()
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError([Problem(name, f"no model to chat with could be loaded: {first}")]) from error
        if torch.cuda.is_available():
            self.model = self.model.cuda()

    def stream(self, messages: Sequence[Message], options: ChatOptions) -> Iterator[str]:
        """The answer, in pieces as they are written. Without a chat template the last turn's text is continued."""
        inputs = self._encode(messages, options).to(self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped = _Stopped()
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}

        def generate() -> None:
            try:
                self.model.generate(
                    **inputs,
                    **(sampling if options.temperature > 0 else {"do_sample": False}),
                    max_new_tokens=options.max_tokens,
                    streamer=streamer,
                    stopping_criteria=[stopped],
                )
            finally:
                streamer.end()

        with ThreadPoolExecutor(max_workers=1) as pool:
            future = pool.submit(generate)
            try:
                yield from streamer
            finally:
                stopped.event.set()
            future.result()

    def _encode(self, messages: Sequence[Message], options: ChatOptions) -> Any:
        if self.tokenizer.chat_template is not None:
            system = [{"role": "system", "content": options.system}] if options.system else []
            return self.tokenizer.apply_chat_template(
                [*system, *messages], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        if options.system:
            raise UserError([Problem("--system", "the model's tokenizer has no chat template, so no system turn")])
        return self.tokenizer(messages[-1]["content"], return_tensors="pt")


def _load(name: str) -> Any:
    if not is_adapter(name):
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    from peft import PeftModel  # a second or two to import, for adapters only

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(find_base(name), dtype="auto"), name)


def answer(
    models: dict[str, ChatModel], histories: dict[str, list[Message]], options: ChatOptions, console: Console
) -> dict[str, str]:
    """Every model's answer to its own history, shown as it is written: in columns on a terminal, else in turn."""
    texts = dict.fromkeys(models, "")
    if not console.is_terminal or len(models) == 1:
        for label, model in models.items():
            if len(models) > 1:
                console.print(f"{label}:", style="bold", highlight=False)
            for piece in model.stream(histories[label], options):
                texts[label] += piece
                console.out(piece, end="", highlight=False)
            console.print()
        return texts
    with Live(console=console, auto_refresh=False) as live:
        for label, model in models.items():
            for piece in model.stream(histories[label], options):
                texts[label] += piece
                live.update(_columns(texts), refresh=True)
    return texts


def _columns(texts: dict[str, str]) -> Table:
    table = Table(expand=True, show_lines=False)
    for label in texts:
        table.add_column(label, ratio=1, overflow="fold")
    table.add_row(*(Text(text) for text in texts.values()))  # not read as markup
    return table


def run_chat(model: str, *, base: str | None, prompt: str | None, options: ChatOptions) -> int:
    """One answer to `prompt`, or a conversation until the input ends; returns the exit code."""
    console = Console()
    names = {"base": base, "trained": model} if base is not None else {"model": model}
    models = {label: ChatModel(name) for label, name in names.items() if name is not None}
    histories: dict[str, list[Message]] = {label: [] for label in models}
    while True:
        if prompt is None:
            try:
                said = console.input("[bold]> [/bold]").strip()
            except EOFError:
                return 0
        else:
            said = prompt
        if not said:
            continue
        for history in histories.values():
            history.append({"role": "user", "content": said})
        texts = answer(models, histories, options, console)
        for label, history in histories.items():
            history.append({"role": "assistant", "content": texts[label]})
        if prompt is not None:
            return 0
