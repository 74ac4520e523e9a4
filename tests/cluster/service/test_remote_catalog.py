"""Models in stores: found in the background, allowed below the operator's roots, their adapters' bases too."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import save, save_file
from starlette.testclient import TestClient

from cluster.config.run import parse_config
from cluster.service.remote_catalog import RemoteCatalog
from cluster.service.settings import Settings
from cluster.service.vetting import model_problem, vet
from tests.support.served import TREE, serving

CAUSAL = {"architectures": ["Qwen3ForCausalLM"], "dtype": "float32", "vocab_size": 257, "max_position_embeddings": 128}
REWARD = {**CAUSAL, "architectures": ["Qwen3ForSequenceClassification"], "num_labels": 1}
WEIGHTS = save({"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float32)})
ROOT = "memory://bucket/models"


class Counting(MemoryFileSystem):
    """A store that counts what it is asked, and may keep silent until it is told to speak."""

    protocol = "counting"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    listings: ClassVar[list[str]] = []
    reads: ClassVar[list[str]] = []
    speaks: ClassVar[threading.Event] = threading.Event()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("counting://", "memory://")))

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self.listings.append(path)
        assert self.speaks.wait(10)
        return super().ls(path, detail=detail, **options)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        self.reads.append(path)
        return super().cat_file(path, start=start, end=end, **options)


fsspec.register_implementation("counting", Counting, clobber=True)


@pytest.fixture(autouse=True)
def empty_stores() -> Iterator[None]:
    Counting.speaks.set()
    yield
    for kind in (MemoryFileSystem, Counting):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    Counting.listings.clear()
    Counting.reads.clear()


def put(address: str, config: dict[str, Any], **files: bytes) -> str:
    """A model, or with `adapter_config` among its keys an adapter, in a store."""
    filesystem, path = fsspec.core.url_to_fs(address)
    filesystem.makedirs(path, exist_ok=True)
    everything = {"config.json": json.dumps(config).encode(), "model.safetensors": WEIGHTS, "tokenizer.json": b"{}"}
    everything |= {"tokenizer_config.json": b'{"chat_template": "{{ messages }}"}', **files}
    for name, content in everything.items():
        filesystem.pipe_file(f"{path}/{name}", content)
    return address


def test_models_in_a_store_are_listed_with_what_they_are(settings: Settings) -> None:
    put(f"{ROOT}/policy", CAUSAL)
    put(f"{ROOT}/team/judge", REWARD)
    put(f"{ROOT}/models--org--name/snapshots/abc", CAUSAL)
    put(f"{ROOT}/1/2/3/4/five", CAUSAL)
    put("memory://bucket/models-of-others/m", CAUSAL)
    with serving(replace(settings, model_stores=(ROOT,))) as client:
        answer = client.get("/api/v1/models").json()
        judges = client.get("/api/v1/models?kind=reward").json()["models"]
        assert client.get("/api/v1/service").json()["model_roots"] == [str(settings.model_roots[0]), ROOT]
    assert (answer["roots"], answer["problems"]) == ([str(settings.model_roots[0]), ROOT], [])
    found = {one["name"]: one for one in answer["models"]}
    assert list(found) == ["org/name", "policy", "team/judge"]
    policy = found["policy"]
    assert (policy["path"], policy["kind"], policy["role"]) == (f"{ROOT}/policy", "policy", "policy")
    assert (policy["parameters"], policy["bytes"], policy["vocabulary"]) == (17, len(WEIGHTS), 257)
    assert (policy["chat_template"], policy["usable"]) == (True, True)
    assert [one["name"] for one in judges] == ["team/judge"]


def test_what_cannot_be_used_says_why_in_terms_of_the_address() -> None:
    put(f"{ROOT}/bare", CAUSAL)
    filesystem = fsspec.filesystem("memory")
    filesystem.rm("/bucket/models/bare/model.safetensors")
    put(f"{ROOT}/torn", CAUSAL, **{"model.safetensors": b"\xff" * 100})
    put(f"{ROOT}/vast", CAUSAL, **{"extra.json": b"x" * ((64 << 20) + 1)})
    adapter = json.dumps({"peft_type": "LORA", "base_model_name_or_path": f"{ROOT}/bare"}).encode()
    put(f"{ROOT}/sft", CAUSAL, **{"adapter_config.json": adapter, "adapter_model.safetensors": WEIGHTS})
    filesystem.rm("/bucket/models/sft/config.json")
    found, _, problems = RemoteCatalog([ROOT]).find()
    assert problems == []
    told = {one.name: one.problem or "" for one in found}
    assert not any(one.usable for one in found)
    assert told["bare"] == "it has no weights (*.safetensors)"
    assert told["torn"].startswith(f"torn: {ROOT}/torn/model.safetensors is not a complete safetensors file")
    assert f"{ROOT}/vast/extra.json has 67.1 MB" in told["vast"]
    assert told["sft"].startswith(f"the base of {ROOT}/sft is the address {ROOT}/bare")


def test_a_store_is_not_asked_for_every_answer_and_not_again_for_what_it_has_said() -> None:
    put("counting://m/policy", CAUSAL)
    Counting.reads.clear()
    models = RemoteCatalog(["counting://m"])
    first = models.find()
    assert Counting.listings == ["/m", "/m/policy"]
    assert models.find() == first
    assert len(Counting.listings) == 2
    always = RemoteCatalog(["counting://m"], fresh_s=0)
    always.find()
    reads = len(Counting.reads)
    assert always.find() == first
    assert len(Counting.listings) == 6
    assert len(Counting.reads) == reads
    put("counting://m/policy", {**CAUSAL, "vocab_size": 300})
    assert always.find()[0][0].vocabulary == 300
    assert not [path for path in Counting.reads if path.endswith("tokenizer.json")]


def test_a_store_that_is_silent_holds_nothing_up() -> None:
    put("counting://m/policy", CAUSAL)
    put(f"{ROOT}/policy", CAUSAL)
    Counting.speaks.clear()
    models = RemoteCatalog(["counting://m", ROOT], wait_s=0.05)
    found, truncated, problems = models.find()
    late = {f"{root} is still being looked through; ask again" for root in ("counting://m", ROOT)}
    assert "counting://m is still being looked through; ask again" in problems
    assert set(problems) <= late  # on a busy machine the other may be late too
    assert not truncated
    assert [one.path for one in found] in ([], [f"{ROOT}/policy"])  # this one is not waited for for long
    Counting.speaks.set()
    patient = RemoteCatalog(["counting://m", ROOT])
    assert [one.path for one in patient.find()[0]] == ["counting://m/policy", f"{ROOT}/policy"]


def test_a_store_that_cannot_be_read_is_a_problem_and_no_error(settings: Settings) -> None:
    stores = ("memory://nowhere", "nosuchstore://bucket/models", ROOT)
    put(f"{ROOT}/policy", CAUSAL)
    with serving(replace(settings, model_stores=stores)) as client:
        answer = client.get("/api/v1/models")
    assert answer.status_code == 200
    assert [one["path"] for one in answer.json()["models"]] == [f"{ROOT}/policy"]
    none, unknown = answer.json()["problems"]
    assert none == "no such folder: memory://nowhere"
    assert unknown.startswith("nosuchstore://bucket/models cannot be read: ValueError: Protocol not known")


@pytest.mark.parametrize("model", ["s3://bucket/models", "s3://bucket/models/policy", "s3://bucket/models/a/b/"])
def test_addresses_below_a_root_are_allowed(settings: Settings, model: str) -> None:
    assert model_problem(model, replace(settings, model_stores=("s3://bucket/models",))) is None


@pytest.mark.parametrize(
    "model",
    [
        "s3://bucket/models-of-others/policy",
        "s3://bucket/models/../secret",
        "s3://bucket/models//../secret",
        "s3://bucket/models/%2e%2e/secret",
        "s3://bucket/models/policy?versionId=1",
        "s3://bucket/models/*",
        "s3://bucket/models/a::file:///etc",
        "zip://m::s3://bucket/models/m.zip",
        "s3://key:secret@bucket/models/policy",
        "S3://bucket/models/policy",
        "gs://bucket/models/policy",
        "file:///etc",
        "file://{store}/link/policy",
        "file://{store}/../secret",
        "http://169.254.169.254/latest",
        "s3://bucket/models/a\nb",
    ],
)
def test_addresses_from_elsewhere(settings: Settings, tmp_path: Path, model: str) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "link").symlink_to("/etc")
    allowing = replace(settings, model_stores=("s3://bucket/models", f"file://{store}"))
    tree = {**TREE, "policy": {"model": model.replace("{store}", str(store))}}
    tree["rewards"] = [{"type": "model", "model": tree["policy"]["model"]}]
    tree["data"] = {"prompts": f"{settings.data_roots[0]}/p.jsonl"}
    found = vet(parse_config(tree), allowing)
    assert [problem.where for problem in found] == ["policy.model", "rewards.0.model"]
    assert "secret" not in found[0].message


def test_without_stores_no_address_is_allowed(settings: Settings) -> None:
    problem = model_problem("s3://bucket/models/policy", settings)
    assert problem is not None
    assert "rlhf serve --models" in problem


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        ("/etc", "is an adapter whose base is not in a folder that models may come from"),
        ("{store}/policy", "is an adapter whose base is not in a folder that models may come from"),
        ("file://{store}/policy", "only a folder or a hub id can be a base"),
    ],
)
def test_the_base_of_an_adapter_in_a_store_must_be_allowed_too(
    settings: Settings, tmp_path: Path, base: str, problem: str
) -> None:
    """The helper that fetches is another process, so that this store is one of files."""
    store = tmp_path / "store"
    for name in ("sft", "policy"):
        (store / name).mkdir(parents=True)
    save_file({"lora": np.zeros((2, 2), np.float32)}, store / "sft" / "adapter_model.safetensors")
    named = base.replace("{store}", str(store))
    (store / "sft" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": named})
    )
    (tmp_path / "data" / "p.jsonl").write_text('{"prompt": "1+1="}\n')
    tree = {**TREE, "policy": {"model": f"file://{store}/sft"}, "data": {"prompts": str(tmp_path / "data" / "p.jsonl")}}
    with serving(replace(settings, model_stores=(f"file://{store}",))) as client:
        plan = client.post("/api/v1/plan", json=tree).json()
        made = client.post("/api/v1/runs", json=tree)
    (found,) = plan["problems"]
    assert found["path"] == "policy.model"
    assert problem in found["message"]
    assert (made.status_code, made.json()["error"]["code"]) == (422, "invalid_config")
    assert plan["config"]["policy"]["model"] == f"file://{store}/sft"
    assert plan["warnings"] == []  # as there is no plan


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a policy that loads, in a store that other processes see too."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from trainers.tiny_models import make_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("store") / "policy", make_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=len(tokenizer), **sizes, num_key_value_heads=1, max_position_embeddings=128)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"file://{folder}"


@pytest.fixture
def client(settings: Settings, policy: str) -> Iterator[TestClient]:
    with serving(replace(settings, model_stores=(policy.rpartition("/")[0],))) as client:
        yield client


@pytest.mark.integration  # imports transformers in a process: seconds
def test_a_run_is_made_with_the_address_that_its_config_names(
    client: TestClient, settings: Settings, policy: str
) -> None:
    prompts = Path(settings.data_roots[0]) / "p.jsonl"
    prompts.write_text('{"prompt": "1+1="}\n')
    sizes = {"sampling": {"max_tokens": 8}, "train": {"prompts_per_step": 1}}
    data = {"prompts": str(prompts), "max_prompt_tokens": 16}
    tree = {**TREE, **sizes, "policy": {"model": policy, "dtype": "float32"}, "data": data}
    plan = client.post("/api/v1/plan", json=tree).json()
    assert plan["problems"] == []
    assert [warning["path"] for warning in plan["warnings"]] == ["data.eval_prompts"]
    assert plan["memory"]
    assert plan["config"]["policy"]["model"] == policy
    made = client.post("/api/v1/runs", json=tree).json()
    run = settings.root / made["run"]["id"]
    assert f"model: {policy}" in (run / "config.yaml").read_text()
    (outline,) = (settings.root / ".models").glob("policy-*")
    assert outline.name.endswith("-outline")


@pytest.mark.integration  # imports transformers in a process: seconds
def test_an_uploads_lengths_in_the_tokens_of_a_model_in_a_store(client: TestClient, policy: str) -> None:
    file = ("p.jsonl", b'{"prompt": "1+1="}\n')
    dataset = client.post("/api/v1/datasets", files={"file": file}).json()["id"]
    asked = client.get(f"/api/v1/datasets/{dataset}/lengths", params={"model": policy, "max_prompt_tokens": 16})
    assert asked.status_code == 200, asked.text
    assert asked.json()["longest"] > 0
    refused = client.get(f"/api/v1/datasets/{dataset}/lengths", params={"model": "file:///etc"})
    assert refused.status_code == 422
    missing = client.get(f"/api/v1/datasets/{dataset}/lengths", params={"model": f"{policy}/none"})
    assert "no such folder" in missing.text
