"""What the stand-in of the API knows: models, uploads, runs made of recorded metrics, and its answers by address.

The schema, the plan's problems and arithmetic, the upload's verdict and the Doctor's findings are the project's own.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from cluster.config.run import RunConfig, parse_config, problems_as_json
from cluster.config.tree import set_path
from cluster.doctor import diagnose
from cluster.planning.plan import batch_arithmetic
from cluster.service.run_creation import differences
from cluster.service.vetting import redacted
from trainers.data.check import CheckOptions, check
from trainers.errors import UserError

RECORDED = Path(__file__).parents[1] / "cluster" / "doctor" / "runs"
API = "/api/v1"
MODELS: list[dict[str, Any]] = [
    {"name": name, "kind": role, "role": role, "architecture": architecture, "parameters": parameters}
    for name, role, architecture, parameters in (
        ("qwen3-0.6b-sft", "policy", "Qwen3ForCausalLM", 596049920),
        ("llama-3.2-1b-instruct", "policy", "LlamaForCausalLM", 1235814400),
        ("preference-rm", "reward", "Qwen3ForSequenceClassification", 596050944),
        ("helpful-rm", "reward", "LlamaForSequenceClassification", 1235816448),
    )
]
JUDGE = "/srv/rewards/rules.py:correct"
ANSWERS = ("25 × 4 = 100\n100 + 10 = 110\n\nThe answer is 110.", "110", "It is 25 × 14 = 350.", "First 25 × 4 = 100.")


def now(minutes: float = 0) -> str:
    return (datetime.now(UTC) - timedelta(minutes=minutes)).isoformat().replace("+00:00", "Z")


def config_tree(**sections: Any) -> dict[str, Any]:
    return {
        "name": "arithmetic",
        "policy": {"model": "/srv/models/qwen3-0.6b-sft"},
        "data": {"prompts": "/srv/data/prompts.jsonl"},
        "rewards": [
            {"type": "model", "model": "/srv/models/preference-rm", "name": "preference"},
            {"type": "function", "path": JUDGE, "weight": 0},
        ],
        "algorithm": {"type": "grpo", "kl": {"coef": 0.02}},
        "train": {"steps": 80},
        **sections,
    }


def recorded(name: str) -> list[dict[str, Any]]:
    """Recorded steps, with the times and rates that the recording left out."""
    rows = [json.loads(line) for line in (RECORDED / f"{name}.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"] > 0]
    for row in steps:
        wave = 1 + 0.1 * ((row["step"] * 37) % 10 - 5) / 5
        row |= {"kl/coef": 0.02, "policy/lr": 4e-5, "rollout/staleness_max": 0, "throughput/tokens_per_s": 480 * wave}
        row |= {
            "time/generate_s": 1.4 * wave,
            "time/reward_s": 0.3,
            "time/annotate_s": 0.15,
            "time/train_s": 0.9 * wave,
        }
        row |= {"weights/sync_s": 0.12, "time/step_s": 3.0 * wave}
        if row["step"] % 10 == 0:
            row["eval/reward_mean"] = 0.1 + 0.018 * row["step"]
    return steps


class Service:
    """The state behind the stand-in; `token` makes it ask for one."""

    def __init__(self, folder: Path, *, token: str | None = None) -> None:
        self.folder, self.token = folder, token
        self.runs: dict[str, dict[str, Any]] = {}
        self.datasets: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, str] = {}
        self.bodies: list[tuple[str, Any]] = []  # of what was posted
        self.error_of_next_run: dict[str, Any] | None = None
        self.upload_limit = 10 * 2**30  # bytes
        self.taking, self.reading = threading.Event(), threading.Event()  # uploads wait for both, in turn
        self.taking.set()
        self.reading.set()
        self.used: set[str] = set()  # datasets that a run reads
        self.base_is_gone = False  # of every run's model
        self.allowed: list[str] | None = None  # of every run, in place of what its state allows
        self.planning = threading.Event()  # a plan waits for it
        self.planning.set()
        self.groups = 6  # of a step's samples
        self.prompt = "Solve step by step: "  # how each begins
        self.busy = False  # with another's chat
        self.more_problems: list[dict[str, Any]] = []  # of every plan
        self.warnings: list[dict[str, Any]] = []  # likewise
        self.schema: Any = RunConfig.model_json_schema()  # tests put another one here
        self.lock = threading.RLock()

    def add_run(self, run_id: str, metrics: list[dict[str, Any]], state: str, **fields: Any) -> dict[str, Any]:
        tree = fields.pop("config", config_tree())
        last = metrics[-1] if metrics else {}
        run = {
            "id": run_id,
            "name": tree.get("name", "run"),
            "state": state,
            "step": last.get("step", 0),
            "steps": tree.get("train", {}).get("steps", 100),
            "created": now(12),
            "started": now(11) if state != "queued" else None,
            "ended": now(1) if state in ("succeeded", "failed", "stopped") else None,
            "headline": {key: last[key] for key in ("reward/mean", "kl/mean") if key in last},
            "error": None,
            "queue": None,
            "stopping": False,
            "by_service": True,
            "versions": {"python": "3.11.9", "vllm": "0.32.0"},
        } | fields
        self.runs[run_id] = {"run": run, "config": parse_config(tree).model_dump(mode="json"), "metrics": metrics}
        return run

    def actions(self, state: str) -> list[str]:
        if self.allowed is not None:
            return self.allowed
        if state in ("running", "queued"):
            return ["stop", "pause", "clone"]
        ended = ["clone", "delete"]
        return ["chat", "download", *ended] if state == "succeeded" else ["resume", *ended]

    def details(self, run_id: str) -> dict[str, Any]:
        held = self.runs[run_id]
        steps = [row["step"] for row in held["metrics"]]
        going = held["run"]["state"] == "running"
        return {
            "run": held["run"],
            "config": redacted(held["config"]),
            "yaml": yaml.safe_dump(held["config"], sort_keys=False),
            "command": "rlhf train config.yaml",
            "actions": self.actions(held["run"]["state"]),
            "path": f"/srv/runs/{run_id}",
            "steps_recorded": len(steps),
            "metrics": held["metrics"][-1] if steps else None,
            "metrics_problem": None,
            "checkpoints": [{"step": step, "bytes": 2411724800} for step in steps if step % 20 == 0],
            "model": {"bytes": 1192135096, "files": 7} if held["run"]["state"] == "succeeded" else None,
            "step_s": 3.0,
            "remaining_s": 3.0 * (held["run"]["steps"] - len(steps)) if going else None,
            "samples": {"step": steps, "eval": [step for step in steps if step % 10 == 0]},
        }

    def samples(self, run_id: str, query: dict[str, list[str]]) -> dict[str, Any]:
        steps = [row["step"] for row in self.runs[run_id]["metrics"]]
        step = int(query.get("step", [steps[-1]])[0])
        made = []
        for group in range(self.groups):
            for index, answer in enumerate(ANSWERS):
                score = 1.4 - 0.9 * index
                sample = {"id": f"{step}-{group}-{index}", "group": group, "completion": answer, "prompt_tokens": 21}
                sample["prompt"] = [{"role": "user", "content": f"{self.prompt}25 * 4 + {10 * (group + 1)} = ?"}]
                sample |= {
                    "tokens": 6 + 5 * len(answer.split()),
                    "rewards": {"preference": score, "correct": float(index < 2)},
                }
                sample |= {"reward": score, "valid": True, "advantage": 1.1 - 0.75 * index, "policy_version": step - 1}
                made.append(sample | {"finish_reason": "length" if index == 3 else "stop"})
        text = query.get("q", [""])[0]
        found = [one for one in made if text.lower() in one["completion"].lower()]
        if "sort" in query:
            found.sort(key=lambda one: one["reward"], reverse=query.get("order", ["desc"])[0] == "desc")
        if "group" in query:
            found = [one for one in found if one["group"] == int(query["group"][0])]
        limit, offset = int(query.get("limit", ["50"])[0]), int(query.get("offset", ["0"])[0])
        kind = query.get("kind", ["step"])[0]
        answer = {"kind": kind, "step": step, "steps": steps, "total": len(found), "rewards": ["preference", "correct"]}
        return answer | {"samples": found[offset : offset + limit]}

    def plan(self, tree: Any) -> dict[str, Any]:
        self.planning.wait(60)
        problems = [*self.more_problems]
        empty: dict[str, Any] = {"config": None, "yaml": None, "command": "rlhf train config.yaml", "gpus": False}
        empty |= {"arithmetic": [], "roles": [], "memory": [], "warnings": self.warnings}
        try:
            config = parse_config(tree)
        except UserError as error:
            return empty | {"problems": problems + _problems(error)}
        allowed = [path["path"] for path in self.models()["models"]]
        if config.policy.model not in allowed:
            problems.append({"path": "policy.model", "message": f"{config.policy.model}: no such model is known here"})
        size = {"weights": 2384199680, "optimizer": 7152599040}
        return empty | {
            "config": config.model_dump(mode="json"),
            "problems": problems,
            "arithmetic": batch_arithmetic(config, prompts=12408),
            "roles": [
                {"name": "generator", "count": 1, "gpus": 0, "cpus": 1, "node": "any"},
                {"name": "learner", "count": 1, "gpus": 0, "cpus": 1, "node": "any"},
                {"name": "reward preference (model)", "count": 1, "gpus": 0, "cpus": 0.1, "node": "any"},
            ],
            "memory": [{"role": "learner", "device": size, "host": {}}],
            "yaml": yaml.safe_dump(tree, sort_keys=False),
        }

    def models(self) -> dict[str, Any]:
        common = {"dtype": "bfloat16", "vocabulary": 151936, "context": 40960, "chat_template": True, "base": None}
        common |= {"run": None, "usable": True, "problem": None, "bytes": 1192135096}
        return {
            "models": [common | model | {"path": f"/srv/models/{model['name']}"} for model in MODELS],
            "roots": ["/srv/models"],
            "problems": [],
            "truncated": False,
        }

    def take(self, name: str, content: bytes) -> dict[str, Any]:
        """An upload's report, from the project's own detector."""
        number = len(self.datasets) + 1
        path = self.folder / f"ds-{number}{''.join(Path(name).suffixes) or '.jsonl'}"
        path.write_bytes(content)
        report = check(str(path), CheckOptions()).as_json()
        dataset = {"id": f"ds-{number}", "name": name, "path": str(path), "bytes": len(content), "created": now()}
        self.datasets[dataset["id"]] = dataset | report | {"advice": None}
        return self.datasets[dataset["id"]]

    def rows(self, dataset: dict[str, Any], count: int) -> list[dict[str, Any]]:
        found = []
        for number, line in enumerate(Path(dataset["path"]).read_bytes().splitlines()[:count], start=1):
            try:
                record = json.loads(line)
                turns = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
                found.append({"line": number, "messages": turns, "columns": {}, "problem": None})
            except (ValueError, KeyError, AttributeError) as error:
                found.append({"line": number, "messages": None, "columns": {}, "problem": f"not a record: {error}"})
        return found

    def start(self, tree: dict[str, Any]) -> dict[str, Any]:
        run_id = f"20260131-1422{len(self.runs):02d}-{tree.get('name', 'run')}-5f0a1c"
        run = self.add_run(run_id, [], "running", config=tree)
        self.runs[run_id]["coming"] = recorded("healthy")[: run["steps"]]
        self.runs[run_id]["error"] = self.error_of_next_run
        return run

    def advance(self, run_id: str) -> dict[str, Any] | None:
        """One step on; None at the end."""
        held = self.runs[run_id]
        with self.lock:
            coming = held.get("coming") or []
            if coming:
                row: dict[str, Any] = coming.pop(0)
                held["metrics"].append(row)
                held["run"] |= {"step": row["step"], "headline": {"reward/mean": row["reward/mean"]}}
                if held.get("error") and row["step"] >= 3:
                    held["coming"] = []
                return row
            if "coming" in held and held["run"]["state"] == "running":
                failed = held.get("error")
                held["run"] |= {"state": "failed" if failed else "succeeded", "error": failed, "ended": now()}
            return None


def _problems(error: UserError) -> list[dict[str, Any]]:
    return [
        {"path": one["where"] if "where" in one else one["path"], "message": one["message"]}
        for one in problems_as_json(error.problems)
    ]


def get(service: Service, parts: list[str], query: dict[str, list[str]]) -> Any:
    """The answer to a GET; None: 404."""
    simple: dict[str, Callable[[], Any]] = {
        "models": service.models,
        "schema/config": lambda: service.schema,
        "service": lambda: {
            "version": "0.1.0",
            "root": "/srv/runs",
            "model_roots": ["/srv/models"],
            "data_roots": [],
            "upload_limit_bytes": service.upload_limit,
            "max_concurrent_runs": 1,
            "reward_functions": [{"path": JUDGE, "name": "correct", "doc": "1 where the answer is right."}],
            "chat": True,
        },
        "cluster": lambda: {
            "state": "ready",
            "message": None,
            "nodes": 1,
            "resources": {"CPU": {"used": 3, "total": 16}, "GPU": {"used": 1, "total": 2}},
            "running": [],
            "queue": [],
        },
        "datasets": lambda: {
            "datasets": list(service.datasets.values())[::-1],
            "total": len(service.datasets),
            "next": None,
        },
        "runs": lambda: _runs(service, query),
    }
    if (name := "/".join(parts)) in simple:
        return simple[name]()
    if parts[0] == "datasets" and parts[1] in service.datasets:
        dataset = service.datasets[parts[1]]
        if len(parts) == 3:
            bins = [{"from": 16 * i, "to": 16 * i + 15, "prompts": n} for i, n in enumerate((3, 40, 22, 9, 2))]
            return {
                "limit": 1024,
                "longest": 71,
                "over_limit": 0,
                "histogram": bins,
                "problems": [],
                "problems_total": 0,
            }
        return dataset | {"rows": service.rows(dataset, int(query.get("rows", ["0"])[0]))}
    if parts[0] == "runs" and parts[1] in service.runs:
        return _run(service, parts[1], parts[2:], query)
    return None


def _runs(service: Service, query: dict[str, list[str]]) -> dict[str, Any]:
    runs = [held["run"] for held in reversed(service.runs.values())]
    counts: dict[str, int] = {}
    for run in runs:
        counts[run["state"]] = counts.get(run["state"], 0) + 1
    states, text = query.get("state"), query.get("q", [""])[0]
    found = [run for run in runs if (not states or run["state"] in states) and text in run["name"]]
    ids = [run["id"] for run in found]
    start = ids.index(query["after"][0]) + 1 if "after" in query else 0
    limit = int(query.get("limit", ["50"])[0])
    page = found[start : start + limit]
    more = page[-1]["id"] if page and start + limit < len(found) else None
    return {"runs": page, "total": len(found), "next": more, "counts": counts}


def _run(service: Service, run_id: str, rest: list[str], query: dict[str, list[str]]) -> Any:
    held = service.runs[run_id]
    if not rest:
        return service.details(run_id)
    if rest == ["metrics"]:
        rows = [row for row in held["metrics"] if row["step"] > int(query.get("since", ["0"])[0])]
        if query.get("format") != ["columns"]:
            return {"metrics": rows, "last": held["run"]["step"], "total": len(rows)}
        stride = max(1, -(-len(rows) // int(query.get("points", ["100000"])[0])))
        rows = rows[(len(rows) - 1) % stride :: stride]
        keys = query.get("keys") or sorted({key for row in rows for key in row} - {"step", "time"})
        series = {key: [row.get(key) for row in rows] for key in keys}
        return {"step": [row["step"] for row in rows], "series": series, "last": None, "total": len(rows)}
    if rest == ["samples"]:
        return service.samples(run_id, query)
    if rest == ["samples", "tokens"]:
        pieces = ["25", " ×", " 4", " =", " 100", "\n", "The", " answer", " is", " 110", "."]
        kl = [0.0, 0.02, 0.3, 0.0, 0.9, 0.0, -0.1, 2.0, 0.0, 0.4, 0.0]
        return {"pieces": pieces, "tokens": list(range(11)), "logprobs": [-0.1] * 11, "kl": kl}
    if rest == ["logs"]:
        files = [{"name": name, "bytes": 2048, "modified": now()} for name in ("driver.log", "learner-0.log")]
        lines = [f"2026-01-31 14:22:{i % 60:02d} step {i}: reward 0.{i % 10}, kl 0.0{i % 9}" for i in range(200)]
        return {"files": files} | (
            {"file": query["file"][0], "lines": lines, "truncated": True} if "file" in query else {}
        )
    if rest == ["diagnosis"]:
        found = diagnose(held["metrics"], held["config"])
        return {"findings": [finding.as_json() for finding in found], "steps": len(held["metrics"])}
    return None


def post(service: Service, parts: list[str], body: Any, key: str | None) -> tuple[Any, int]:
    """The answer to a POST and its status."""
    if parts == ["plan"]:
        return service.plan(body), 200
    if parts == ["runs"]:
        if key in service.keys:
            return {"run": service.runs[service.keys[key]]["run"]}, 200
        if problems := service.plan(body)["problems"]:
            return {"error": {"code": "invalid_config", "message": "problems found", "details": problems}}, 422
        run = service.start(body)
        if key:
            service.keys[key] = run["id"]
        return {"run": run}, 201
    return _post_run(service, service.runs[parts[1]], parts[2:], body)


def _post_run(service: Service, held: dict[str, Any], rest: list[str], body: Any) -> tuple[Any, int]:
    if rest[0] in ("stop", "pause", "resume"):
        held["run"]["state"] = {"stop": "stopped", "pause": "paused", "resume": "running"}[rest[0]]
        return {"run": held["run"]}, 202
    if rest == ["model", "ticket"]:
        return {"url": f"{API}/runs/{held['run']['id']}/model?ticket=1", "seconds": 60}, 201
    tree = json.loads(json.dumps(held["config"]))
    for path, value in (body.get("changes") or {}).items():
        tree = set_path(tree, path, value)
    tree["name"] = body.get("name") or tree["name"]
    if rest == ["clone", "plan"]:
        return service.plan(tree) | {"changes": differences(held["config"], tree)}, 200
    return {"run": service.start(tree)}, 201
