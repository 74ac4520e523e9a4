"""Models from stores: fetched once and whole, outlines for plans, and what a resumed run goes on with."""

from __future__ import annotations

import fcntl
import json
import threading
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from safetensors import safe_open
from safetensors.numpy import load_file, save

from cluster.config.run import parse_config
from cluster.models.object_store import StoreError
from cluster.models.remote import addresses, as_resumed, as_run, fetch, fetched, model_store, outlined
from cluster.runs.directory import RunDirectory
from tests.support import remote_stores
from trainers.errors import UserError

ADDRESS = "memory://models/policy"


@pytest.fixture(autouse=True)
def empty_stores():
    yield
    remote_stores.Torn.broken = True
    for kind in (MemoryFileSystem, remote_stores.Torn):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]


@pytest.fixture
def store(tmp_path):
    return model_store(tmp_path)


def config_of(tmp_path, **models):
    return parse_config(
        {
            "root": str(tmp_path),
            "policy": {"model": models.get("policy", ADDRESS)},
            "data": {"prompts": "p.jsonl"},
            "rewards": [{"type": "model", "model": models.get("reward", "org/reward")}],
            "algorithm": {"type": "grpo"},
        }
    )


def names(store):
    return sorted(path.name for path in store.iterdir() if not path.name.endswith(".lock"))


def test_a_model_comes_whole_with_the_files_that_loading_needs(store):
    remote_stores.put_model(ADDRESS)
    remote_stores.put(
        ADDRESS, {"pytorch_model.bin": "x", "modeling.py": "x", "README.md": "x", "chat_template.jinja": "x"}
    )
    remote_stores.put(f"{ADDRESS}/deeper", {"other.json": "{}"})
    told = []
    folder = fetch(ADDRESS, store, "complete", note=told.append)
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert folder.name == "policy"
    assert folder.parent.name.startswith("policy-")
    assert (load_file(folder / "model.safetensors")["a"] == remote_stores.TENSORS["a"]).all()
    assert told == ["fetching memory://models/policy (0.0 MB)"]


def test_an_unchanged_model_is_not_fetched_again_and_a_changed_one_is(store):
    remote_stores.put_model(ADDRESS)
    first = fetch(ADDRESS, store, "complete")
    told = []
    assert fetch(ADDRESS, store, "complete", note=told.append) == first
    assert told == []
    remote_stores.put(ADDRESS, {"model.safetensors": save({"a": remote_stores.TENSORS["b"]})})
    second = fetch(ADDRESS, store, "complete")
    assert second != first
    assert list(load_file(second / "model.safetensors")) == ["a"]
    assert set(load_file(first / "model.safetensors")) == {"a", "b"}


def test_a_fetch_that_breaks_off_leaves_nothing_that_is_taken_for_whole(store):
    remote_stores.put_model("torn://models/policy")
    with pytest.raises(
        StoreError, match="torn://models/policy cannot be read: ConnectionResetError: the store hung up"
    ):
        fetch("torn://models/policy", store, "complete")
    (partial,) = names(store)
    assert partial.startswith(".policy-")
    assert not list(store.glob("policy-*"))
    kept = store / partial / "policy" / "config.json"
    inode = kept.stat().st_ino
    remote_stores.Torn.broken = False
    folder = fetch("torn://models/policy", store, "complete")
    assert (folder / "config.json").stat().st_ino == inode  # what was whole is not fetched again
    assert set(load_file(folder / "model.safetensors")) == {"a", "b"}
    assert names(store) == [folder.parent.name]


def test_a_process_waits_for_another_that_fetches_the_same(store):
    remote_stores.put_model(ADDRESS)
    first = fetch(ADDRESS, store, "complete")
    (store / first.parent.name).rename(store / "aside")
    told, waiting = [], threading.Event()

    def note(text):
        told.append(text)
        waiting.set()

    found = []
    with (store / f".{first.parent.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=lambda: found.append(fetch(ADDRESS, store, "complete", note=note)))
        other.start()
        assert waiting.wait(10)
        (store / "aside").rename(first.parent)
    other.join(10)
    assert found == [first]
    assert told == ["another process is fetching memory://models/policy; waiting for it"]


def test_an_outline_says_all_but_the_weights(store):
    remote_stores.put_model(ADDRESS)
    outline = fetch(ADDRESS, store, "outline")
    assert outline.parent.name.endswith("-outline")
    with safe_open(outline / "model.safetensors", framework="np") as tensors:
        assert {key: tensors.get_slice(key).get_shape() for key in tensors.keys()} == {"a": [3, 4], "b": [5]}  # noqa: SIM118
    assert json.loads((outline / "config.json").read_text()) == remote_stores.CAUSAL
    whole = fetch(ADDRESS, store, "complete")
    assert whole != outline
    assert (outline / "model.safetensors").stat().st_size == (whole / "model.safetensors").stat().st_size
    assert load_file(outline / "model.safetensors")["b"].sum() == 0
    assert load_file(whole / "model.safetensors")["b"].sum() == 5


def test_what_is_no_model_is_refused_before_anything_is_fetched(store):
    remote_stores.put("memory://models/empty", {"model.safetensors": "x"})
    with pytest.raises(StoreError, match=r"has no config\.json and no adapter_config\.json"):
        fetch("memory://models/empty", store, "complete")
    remote_stores.put_model("memory://models/large")
    remote_stores.put("memory://models/large", {"data.json": b"x" * ((64 << 20) + 1)})
    with pytest.raises(StoreError, match=r"memory://models/large/data\.json has 67\.1 MB, more than"):
        fetch("memory://models/large", store, "complete")
    assert not store.exists()


def test_a_config_gets_folders_and_keeps_its_rewards_names(tmp_path):
    remote_stores.put_model(ADDRESS)
    remote_stores.put_model("memory://models/judge")
    config = config_of(tmp_path, reward="memory://models/judge")
    assert addresses(config) == {"policy.model": ADDRESS, "rewards.0.model": "memory://models/judge"}
    here = outlined(config).config
    assert here.policy.model.startswith(str(model_store(tmp_path)))
    assert here.rewards[0].model.endswith("/judge")
    assert outlined(config_of(tmp_path, policy="org/policy")).config == config_of(tmp_path, policy="org/policy")


def test_every_model_that_cannot_be_had_is_named_by_its_key(tmp_path):
    with pytest.raises(UserError) as caught:
        outlined(config_of(tmp_path, policy="memory://nowhere/policy", reward="nosuchstore://m/judge"))
    found = {problem.where: problem.message for problem in caught.value.problems}
    assert found["policy.model"] == "no such folder: memory://nowhere/policy"
    assert found["rewards.0.model"].startswith("nosuchstore://m/judge cannot be read: ValueError: Protocol not known")


def new_run(tmp_path):
    config = config_of(tmp_path)
    return RunDirectory.create(tmp_path, config.name, config), config


def test_a_run_notes_what_it_began_with_and_goes_on_with_that(tmp_path):
    remote_stores.put_model(ADDRESS)
    run, config = new_run(tmp_path)
    assert as_run(config, run).policy.model == ADDRESS
    began = fetched(config, run, note=lambda _: None)
    assert as_run(config, run) == began
    assert run.config()["policy"]["model"] == ADDRESS
    remote_stores.put_model(ADDRESS, vocab_size=300)
    assert fetched(config, run, note=lambda _: None) == began  # resumed
    other, _ = new_run(tmp_path)
    assert fetched(config, other, note=lambda _: None) != began


def test_the_checks_of_a_resumed_run_need_no_store(tmp_path, monkeypatch):
    remote_stores.put_model(ADDRESS)
    run, config = new_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    began = fetched(config, RunDirectory(Path(run.path.name)), note=lambda _: None)
    assert Path(began.policy.model).is_absolute()
    fsspec.filesystem("memory").rm("/models/policy", recursive=True)
    assert as_resumed(config, run.path.name) == began
    assert as_resumed(config, "never") == config
    assert as_resumed(config, "auto") == config  # a run without a checkpoint is not resumed by itself
    (run.checkpoints / "step-000001").mkdir()
    (run.checkpoints / "step-000001" / "manifest.json").write_text("{}")
    assert as_resumed(config, "auto") == began


def test_a_run_is_not_resumed_with_another_model_than_it_began_with(tmp_path):
    remote_stores.put_model(ADDRESS)
    run, config = new_run(tmp_path)
    began = fetched(config, run, note=lambda _: None).policy.model
    model_store(tmp_path).rename(tmp_path / "gone")
    remote_stores.put_model(ADDRESS, vocab_size=300)
    with pytest.raises(UserError, match="is not what this run began with") as caught:
        fetched(config, run, note=lambda _: None)
    assert caught.value.problems[0].where == "policy.model"
    assert began.rpartition("/")[0].rpartition("/")[2] in str(caught.value)


class Timeless(MemoryFileSystem):
    """A store whose listing has sizes only."""

    protocol = "timeless"

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("timeless://", "memory://"))

    def ls(self, path, detail=True, **options):
        keys = ("name", "size", "type")
        return [{key: entry[key] for key in keys} for entry in super().ls(path, detail=True, **options)]


def test_a_store_that_would_not_show_a_change_is_refused(store):
    fsspec.register_implementation("timeless", Timeless, clobber=True)
    remote_stores.put_model(ADDRESS)
    with pytest.raises(StoreError, match=r"does not say size and time of timeless://models/policy/config\.json"):
        fetch("timeless://models/policy", store, "complete")
