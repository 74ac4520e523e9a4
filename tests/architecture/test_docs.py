"""The docs agree with the code: keys, paths, links, commands, messages and tests that they name exist."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from cluster.cli.main import app
from cluster.config.run import RunConfig, load_config, run_schema
from cluster.planning.plan import find_problems
from trainers.tiny_models import make_random_policy

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
LAYERS = ("trainers", "actors", "cluster")
FOLDERS = (*LAYERS, "tests", "docs", "benchmarks", "deploy", "examples")
SOURCES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]

# What programs outside the project read from metrics.jsonl: keys by section. It may grow; nothing may be removed.
PUBLIC_METRICS = {
    "": "step time",
    "policy": "version loss entropy clip_fraction grad_norm lr",
    "reward": "mean std <name> failed",
    "kl": "mean coef",
    "value": "loss explained_variance",
    "distill": "jsd",
    "rollout": "length_mean truncated_fraction samples tokens staleness_max logprob_gap_mean logprob_gap_max",
    "importance": "ess clipped_fraction",
    "advantage": "zero_groups",
    "weights": "sync_bytes sync_s",
    "time": "generate_s reward_s annotate_s train_s step_s",
    "throughput": "tokens_per_s",
    "eval": "reward_mean <name>",
}
# Sums that the learners report for the driver to combine; no run records them.
INTERNAL = {"importance/weight", "importance/weight_squared", "value/error", "value/error_squared"}
INTERNAL |= {"value/return", "value/return_squared"}

page_names = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def in_backticks(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def metrics_in_code() -> set[str]:
    """Every text in the code of step_metrics.py, the algorithms and the learner that has the form of a metric's key."""
    files = [ROOT / "cluster/training/step_metrics.py", *(ROOT / "trainers/algorithms").glob("*.py")]
    files += (ROOT / "actors/learner").glob("*.py")
    key = re.compile(rf"(adalora|{'|'.join(filter(None, PUBLIC_METRICS))})/[a-z_0-9]+")
    texts = (
        node.value
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return {text for text in texts if key.fullmatch(text)} - INTERNAL


def test_every_metric_is_explained() -> None:
    found = metrics_in_code()
    assert {"kl/mean", "policy/loss", "adalora/budget", "time/step_s"} <= found
    explained = dict(re.findall(r"^\| `([^`]+)` \| ([^|]+) \|$", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE))
    public = {f"{section}/{name}".lstrip("/") for section, names in PUBLIC_METRICS.items() for name in names.split()}
    assert found | public == set(explained)
    assert all(len(text.split()) >= 2 for text in explained.values())


def test_every_config_key_is_explained() -> None:
    rows = dict(re.findall(r"^\| `([^`]+)` \|[^\n]*\| ([^|]+) \|$", (ROOT / "docs/configuration.md").read_text(), re.M))
    for leaf in run_schema().leaves():
        assert len(rows.get(leaf.path.replace("*.", "\\*."), rows.get(leaf.path, "")).split()) >= 3, leaf.path


@page_names
def test_a_page_starts_with_a_title_and_its_purpose(page: Path) -> None:
    title, blank, *rest = page.read_text(encoding="utf-8").splitlines()
    purpose = list(itertools.takewhile(bool, rest))
    assert title.startswith("# ")
    assert blank == ""
    assert 1 <= len(purpose) <= 2, purpose
    assert purpose[-1].endswith((".", ":"))
    assert not purpose[0].startswith((" ", "|", "`", "-", "!"))


@page_names
def test_paths_exist(page: Path) -> None:
    for text in in_backticks(page):
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*-]*", text):
            assert list(ROOT.glob(text.rstrip("/"))), f"{page.name} names {text}"


@page_names
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


def test_pictures_and_pages_are_linked_from_the_front_page() -> None:
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS if f"(docs/{page.name})" not in front] == []


def commands(page: Path) -> Iterator[list[str]]:
    """The command lines of a page that call `rlhf`, in blocks and in backticks, as arguments."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^ {4,}(?:\.venv/bin/)?(rlhf [^\n]*(?:\n +\[[^\n]*)*)", text, re.MULTILINE)
    inline = re.findall(r"`(?:\.venv/bin/)?(rlhf [^`\n]+)`", text)
    for line in [*blocks, *inline]:
        line = re.sub(r"[…\[\]|]", " ", re.sub(r"\s#\s.*", "", line))
        yield shlex.split(line)[1:]


def resolve(arguments: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the first words name, and what follows."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
        assert arguments[0] in command.commands, f"no command {arguments[0]}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    return command, arguments


@page_names
def test_commands_and_options_exist(page: Path) -> None:
    keys = {leaf.path for leaf in run_schema().leaves()}
    for arguments in commands(page):
        command, rest = resolve(arguments)
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for word in rest:
            if word.startswith("--"):
                assert word.partition("=")[0] in options | {"--help"}, f"{page.name}: {arguments}"
            elif re.fullmatch(r"[a-z_]+(\.\w+)+=.*", word):
                assert re.sub(r"\.\d+\.", ".*.", word.partition("=")[0]) in keys, f"{page.name}: {arguments}"


def test_commands_are_found() -> None:
    found = [arguments for page in PAGES for arguments in commands(page)]
    assert ["train", "run.yaml", "sampling.n=16"] in found
    assert ["data", "check", "prompts.jsonl"] in found
    assert len(found) > 30
    with pytest.raises(AssertionError, match="no command"):
        resolve(["fly"])


@page_names
def test_other_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:^ {4}|`|&& )make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, f"{page.name}: make {target}"
    for module in re.findall(rf"python -m ((?:{'|'.join(FOLDERS)})[\w.]*)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{page.name}: {module}"


@page_names
def test_settings_named_in_the_text_exist(page: Path) -> None:
    """`train.steps`, `learners.zero_stage=3`: a key, or a section, of the config."""
    keys = {leaf.path for leaf in run_schema().leaves()}
    sections = {path.rpartition(".")[0] for path in keys} - {""}
    first = {section.partition(".")[0] for section in sections}
    for text in in_backticks(page):
        name = re.match(r"([a-z_]+(?:\.(?:\*|\w+))+)(?:[=:]|$)", text)
        if name and name[1].partition(".")[0] in first and not name[1].endswith((".md", ".py", ".json", ".jsonl")):
            assert name[1] in keys | sections or name[1].endswith(".*"), f"{page.name} names {text}"


@page_names
def test_example_configs_are_valid(page: Path) -> None:
    for block in re.findall(r"^ *```yaml\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        tree = yaml.safe_load(block)
        if "policy" in tree and "algorithm" in tree:
            RunConfig.model_validate(tree)


def test_the_first_run_of_the_front_page_has_no_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files as a reader copies them, with an untrained policy where the demo's is."""
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    for language, name in (("json", "prompts.jsonl"), ("python", "rewards.py"), ("yaml", "run.yaml")):
        block = re.search(rf"^   ```{language}\n(.*?)^   ```", front, re.MULTILINE | re.DOTALL)
        assert block is not None
        (tmp_path / name).write_text(textwrap.dedent(block[1]), encoding="utf-8")
    make_random_policy(tmp_path / ".cache" / "demo" / "policy")
    monkeypatch.chdir(tmp_path)
    assert find_problems(load_config(Path("run.yaml"), ["sampling.n=16"])) == []


def messages() -> str:
    """Every text of the code, formatted parts left out."""
    nodes = (node for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return "\n".join(n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))


def test_quoted_messages_are_those_of_the_program() -> None:
    """The first column of docs/troubleshooting.md; `…` stands for parts that change."""
    said = re.sub(r"`([^`]*)`", r"\1", messages())
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)
    quoted = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 30
    for text in quoted:
        if re.fullmatch(r"--host|[a-z_]+/[a-z_]+", text):  # an option, a metric
            continue
        for part in text.split("…"):
            assert part.strip(" ,") in said, f"docs/troubleshooting.md quotes {text!r}"


def named_tests() -> tuple[dict[str, set[str]], set[str]]:
    by_file: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        found = re.findall(r"^\s*(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        by_file.setdefault(path.stem, set()).update(found)
    return by_file, {name for names in by_file.values() for name in names}


def test_tests_named_in_the_docs_exist() -> None:
    by_file, every = named_tests()
    page = ROOT / "docs" / "semantics.md"
    named = [text for text in in_backticks(page) if re.match(r"(…?::|…|test_)", text)]
    assert len(named) > 80
    for text in named:
        file, colons, name = text.rpartition("::")
        name = name.partition("[")[0]
        known = by_file.get(file, set()) if colons and file != "…" else every | set(by_file)
        pattern = re.compile(".*".join(map(re.escape, name.split("…"))))
        assert any(pattern.fullmatch(test) for test in known), f"docs/semantics.md names {text}"
