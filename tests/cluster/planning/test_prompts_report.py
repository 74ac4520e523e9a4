"""A prompts file is tokenized once: for plan, launch and page, over edits of the config and interruptions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.config.run import RunConfig, parse_config
from cluster.planning.prompts_report import prompts_problems
from cluster.runs.directory import RunDirectory
from cluster.runs.prompts_cache import KnownLengths, PromptsCache
from cluster.service.workers.main import lengths as count_lengths
from cluster.service.workers.messages import LengthsWork
from cluster.training.launch import open_data
from trainers.data.chat import ChatEncoder, Lengths, measure
from trainers.data.findings import Finding
from trainers.data.reader import open_prompts
from trainers.tiny_models import CHAT_TEMPLATE, make_tokenizer
from trainers.types import Prompt

LONGEST = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # a byte a token
REFUSING = LONGEST.replace("{{", "{% if m['content'] == 'no' %}{{ raise_exception('no') }}{% endif %}{{", 1)


class Spy:
    """Counts the prompts that are encoded to measure them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[str] = []
        self.fail_after: int | None = None
        lengths = ChatEncoder.lengths

        def counted(encoder: ChatEncoder, prompts: Sequence[Prompt]) -> list[int | Finding]:
            if self.fail_after is not None and len(self.texts) >= self.fail_after:
                raise KeyboardInterrupt
            self.texts += [str(prompt.messages[0]["content"]) for prompt in prompts]
            return lengths(encoder, prompts)

        monkeypatch.setattr(ChatEncoder, "lengths", counted)

    def taken(self) -> list[str]:
        """Those since the last time."""
        texts, self.texts = self.texts, []
        return texts


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(*texts: str, name: str = "p.jsonl", **columns: Any) -> str:
        (tmp_path / name).write_text("".join(json.dumps({"prompt": text, **columns}) + "\n" for text in texts))
        return str(tmp_path / name)

    return write


def make(model: Path, prompts: str, *, root: Path | None = None, template: str = LONGEST, **data: Any) -> RunConfig:
    return parse_config(
        {
            "root": str(root or Path(prompts).parent / "runs"),
            "policy": {"model": str(model), "chat_template": template},
            "data": {"prompts": prompts, **data},
            "rewards": [{"type": "function", "path": "r.py:score"}],
            "algorithm": {"type": "grpo"},
        }
    )


def found(config: RunConfig) -> tuple[int | None, list[tuple[str, str]]]:
    usable, problems = prompts_problems(config, tokenize=True)
    return usable, [(problem.where, problem.message) for problem in problems]


def test_plans_and_the_launch_tokenize_a_file_once(spy: Spy, model: Path, write: Any) -> None:
    config = make(model, write("a", "bb"), eval_prompts=write("ccc", name="e.jsonl"))
    assert found(config) == found(config) == (2, [])
    run = RunDirectory.create(Path(config.root), "run", config)
    assert len(open_data(config, run).eval_prompts) == 1
    assert sorted(spy.taken()) == ["a", "bb", "ccc"]


def test_another_limit_is_applied_to_the_lengths_that_are_known(spy: Spy, model: Path, write: Any) -> None:
    path = write("a", "bb", "ccc")
    assert found(make(model, path)) == (3, [])
    spy.taken()
    where, message = f"{path}:3", "prompt: found 3 tokens; expected at most 2 (data.max_prompt_tokens; "
    usable, problems = found(make(model, path, max_prompt_tokens=2))
    assert usable is None
    assert [(w, m.startswith(message)) for w, m in problems] == [(where, True)]
    assert found(make(model, path, max_prompt_tokens=2, overlong="filter")) == (2, [])
    assert spy.taken() == []


def test_what_the_page_counted_is_known_to_the_plan(spy: Spy, model: Path, write: Any, tmp_path: Path) -> None:
    path = write("a", "bb")
    asked = LengthsWork(path=path, model=str(model), root=str(tmp_path / "runs"), max_prompt_tokens=1)
    assert count_lengths(asked)["lengths"]["over_limit"] == 2
    assert spy.taken() == ["a", "bb"]
    config = make(model, path)
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"chat_template": None})})
    assert found(config) == (2, [])
    assert spy.taken() == []


def test_a_file_that_was_touched_or_copied_is_not_tokenized_again(spy: Spy, model: Path, write: Any) -> None:
    path = write("a", "bb")
    config = make(model, path)
    assert found(config) == (2, [])
    spy.taken()
    Path(path).touch()
    assert found(config) == (2, [])
    copy = shutil.copy(path, f"{path[: -len('.jsonl')]}-copy.jsonl")
    assert found(make(model, copy)) == (2, [])
    assert spy.taken() == []


def test_another_content_tokenizer_or_template_is_tokenized(spy: Spy, model: Path, write: Any, tmp_path: Path) -> None:
    config = make(model, write("a"))
    assert found(config) == (1, [])
    assert found(make(model, write("b"))) == (1, [])
    assert found(make(model, write("b"), template=CHAT_TEMPLATE)) == (1, [])
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (other / "special.txt").write_text("of another tokenizer")
    assert found(make(other, write("b"))) == (1, [])
    assert spy.taken() == ["a", "b", "b", "b"]


def test_prompts_that_the_template_refuses_are_reported_each_time(spy: Spy, model: Path, write: Any) -> None:
    path = write("a", "no")
    first = found(make(model, path, template=REFUSING))
    again = found(make(model, path, template=REFUSING, max_prompt_tokens=99))
    assert first == again
    assert [where for where, _ in first[1]] == [f"{path}:2"]
    assert "refuses: no" in first[1][0][1]
    assert spy.taken() == ["a", "no", "no"]  # the reason is asked for again


def test_problems_and_missing_responses_are_part_of_the_report(model: Path, write: Any) -> None:
    path = write("a", "bb", response="c")
    config = make(model, path)
    assert found(config) == found(config)
    assert found(config)[0] is None
    assert [where for where, _ in found(config)[1]] != []
    assert found(make(model, write("a", name="fine.jsonl"))) == (1, [])


def test_a_damaged_entry_is_computed_again(spy: Spy, model: Path, write: Any) -> None:
    config = make(model, write("a"))
    assert found(config) == (1, [])
    cache = PromptsCache(Path(config.root))
    for file in cache.folder.iterdir():
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert found(config) == (1, [])
    assert found(config) == (1, [])
    assert spy.taken() == ["a", "a"]


def test_without_room_for_a_cache_a_plan_is_the_same(spy: Spy, model: Path, write: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = make(model, write("a"), root=tmp_path / "file" / "runs")
    assert found(config) == found(config) == (1, [])
    assert spy.taken() == ["a", "a"]


def test_an_interrupted_count_continues_from_what_it_had(spy: Spy, model: Path, write: Any, tmp_path: Path) -> None:
    texts = [str(number) for number in range(600)]  # three batches
    prompts, encoder = open_prompts(write(*texts)).files[0], ChatEncoder.load(str(model), chat_template=LONGEST)
    memory = KnownLengths(PromptsCache(tmp_path), "tokenizer", keep_every_s=0)
    spy.fail_after = 512
    with pytest.raises(KeyboardInterrupt):
        list(measure(prompts, encoder, Lengths(2), memory=memory))
    assert len(spy.taken()) == 512
    spy.fail_after = None
    lengths = Lengths(2)
    too_long = [number for number, _, _ in measure(prompts, encoder, lengths, memory=memory)]
    assert spy.taken() == texts[512:]
    assert too_long == list(range(100, 600))
    assert (lengths.longest, lengths.over) == (3, 500)


def test_without_a_policy_the_files_are_read_and_not_tokenized(spy: Spy, tmp_path: Path, write: Any) -> None:
    config = make(tmp_path / "absent", write("a"))
    assert prompts_problems(config, tokenize=False) == (1, [])
    assert spy.taken() == []
    usable, problems = prompts_problems(config, tokenize=True)
    assert usable == 1
    assert [problem.where for problem in problems] == [str(tmp_path / "absent")]
