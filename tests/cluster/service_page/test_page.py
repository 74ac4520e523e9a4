"""The page in a real Chromium: from an upload to a started run, and what happens when something is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from stand_in import StandIn
from stand_in_state import Service, config_tree, recorded
from watched import Open

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

PROMPTS = "".join(json.dumps({"prompt": f"Write haiku number {i}."}) + "\n" for i in range(30))


def file(tmp_path: Path, name: str, content: str) -> Path:
    path = tmp_path / name
    path.write_text(content)
    return path


def upload(page: Page, path: Path) -> None:
    page.locator("input[type=file]").set_input_files(path)


def drafted(page: Page, section: str, wanted: object) -> None:
    """Wait until the draft's section is this; it is stored after it is shown."""
    same = """([name, text]) => JSON.stringify(JSON.parse(sessionStorage.getItem("rlhf-draft")).tree[name]) === text"""
    page.wait_for_function(same, arg=[section, json.dumps(wanted, separators=(",", ":"))])


def test_from_an_upload_to_a_finished_run(browse: Open, service: Service, tmp_path: Path) -> None:
    page = browse().open()
    expect(page.get_by_role("heading", name="No runs yet")).to_be_visible()
    page.get_by_role("link", name="Start the first run").click()
    page.get_by_role("radio", name=re.compile("qwen3-0.6b-sft")).check()
    page.get_by_role("radio", name=re.compile("preference-rm")).check()
    page.get_by_label("Use of correct").select_option("watched")
    page.get_by_role("link", name="Go on").click()

    upload(page, file(tmp_path, "prompts.jsonl", PROMPTS))
    expect(page.get_by_role("heading", name="RLHF Online, 30 prompts, ready")).to_be_visible()
    expect(page.get_by_text("Write haiku number 0.")).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("Prompt lengths"))).to_be_visible()
    page.get_by_role("link", name="Go on").click()

    expect(page.get_by_role("radio", name=re.compile("RLHF, online"))).to_be_checked()
    expect(page.get_by_role("radio", name=re.compile("^GRPO"))).to_be_checked()
    page.get_by_label("KL coefficient", exact=True).fill("0.08")
    page.get_by_label("Steps", exact=True).fill("12")
    page.get_by_role("link", name="Review", exact=True).last.click()

    page.get_by_label("What is the run called?").fill("haiku")
    expect(page.get_by_text("32 prompts × 8 completions = 256 samples a step")).to_be_visible()
    expect(page.get_by_label("config.yaml", exact=True)).to_contain_text("coef: 0.08")
    expect(page.get_by_label("command that submits to a cluster", exact=True)).to_have_text("rlhf submit config.yaml")
    page.get_by_role("button", name="Start training").click()

    expect(page.get_by_role("heading", name="haiku")).to_be_visible()
    expect(page.locator(".run-head .state")).to_have_text("succeeded")
    expect(page.get_by_role("img", name=re.compile(r"^Reward, 12 points to step 12"))).to_be_visible()
    ((_, sent),) = [body for body in service.bodies if body[0] == "/api/v1/runs"]
    assert sent["name"] == "haiku"
    assert sent["policy"] == {"model": "/srv/models/qwen3-0.6b-sft"}
    assert [(r["type"], r.get("weight")) for r in sent["rewards"]] == [("model", None), ("function", 0)]
    assert sent["algorithm"] == {"type": "grpo", "kl": {"coef": 0.08}}
    assert sent["train"] == {"steps": 12}

    page.get_by_role("link", name="Chat").click()
    page.get_by_label("Your turn").fill("25 * 4 + 10 = ?")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("region", name="After training")).to_contain_text("The answer is 110.")
    expect(page.get_by_role("region", name="Before")).to_contain_text("I like numbers.")


def test_a_chat_whose_base_is_gone(browse: Open, service: Service) -> None:
    service.add_run("20260131-1-good", recorded("healthy"), "succeeded")
    service.base_is_gone = True
    page = browse().open("#/runs/20260131-1-good/chat")
    for turn in ("25 * 4 + 10 = ?", "And 1 more?"):
        page.get_by_label("Your turn").fill(turn)
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("region", name="Before")).to_contain_text("cannot be asked any more: no such folder")
        expect(page.get_by_role("region", name="After training")).to_contain_text(turn)
        expect(page.get_by_role("region", name="After training").locator(".turn").last).to_have_text(
            re.compile("The answer is 110.")
        )
    asked = [body for path, body in service.bodies if path.endswith("/chat")]
    assert [len(body["base"] or ()) for body in asked] == [1, 0]


def test_a_chat_that_is_refused_can_be_asked_again(browse: Open, service: Service) -> None:
    service.add_run("20260131-1-good", recorded("healthy"), "succeeded")
    service.busy = True
    watched = browse()
    watched.expected = ["429"]
    page = watched.open("#/runs/20260131-1-good/chat")
    turn = page.get_by_label("Your turn")
    turn.fill("25 * 4 + 10 = ?")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert")).to_contain_text("somebody else is chatting")
    expect(turn).to_have_value("25 * 4 + 10 = ?")
    expect(page.get_by_role("region", name="After training")).to_contain_text("Ask something below")
    service.busy = False
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("region", name="After training")).to_contain_text("The answer is 110.")
    asked = [body for path, body in service.bodies if path.endswith("/chat")]
    assert [[said["role"] for said in body["trained"]] for body in asked] == [["user"], ["user"]]


def test_a_chat_is_as_warm_as_it_was_asked_to_be(browse: Open, service: Service) -> None:
    service.add_run("20260131-1-good", recorded("healthy"), "succeeded")
    page = browse().open("#/runs/20260131-1-good/chat")
    page.get_by_text("How they answer").click()
    temperature = page.get_by_label("Temperature")
    for typed in ("0", "0,7"):
        temperature.fill(typed)
        page.get_by_label("Your turn").fill("25 * 4 + 10 = ?")
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("button", name="Begin anew")).to_be_enabled()
    assert [body["temperature"] for path, body in service.bodies if path.endswith("/chat")] == [0, 0.7]
    temperature.fill("warm")
    expect(temperature).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_role("alert")).to_have_text("A number from 0 to 10.")
    page.get_by_label("Your turn").fill("And now?")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()


@pytest.mark.parametrize(
    ("content", "verdict", "advice"),
    [
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "Preference pairs, 1 prompt, not ready", "for DPO"),
        ('{"prompt": "a"}\nnot json\n', "RLHF Online, 1 prompt, not ready", "1 problem by line"),
        ('{"text": "once upon a time"}\n', "Plain text, 1 prompt, not ready", "needs a prompt"),
    ],
)
def test_a_file_that_is_not_ready(browse: Open, tmp_path: Path, content: str, verdict: str, advice: str) -> None:
    page = browse().open("#/new/data")
    upload(page, file(tmp_path, "bad.jsonl", content))
    expect(page.get_by_role("heading", name=verdict)).to_be_visible()
    expect(page.get_by_label("The dataset")).to_contain_text(advice)


def test_a_file_is_dropped(browse: Open) -> None:
    page = browse().open("#/new/data")
    target = page.get_by_role("region", name="Upload prompts")
    expect(target).to_be_visible()
    transfer = page.evaluate_handle(
        """(text) => { const data = new DataTransfer();
          data.items.add(new File([text], "dropped.jsonl")); return data; }""",
        PROMPTS,
    )
    target.dispatch_event("dragover", {"dataTransfer": transfer})
    expect(target).to_have_class(re.compile("over"))
    target.dispatch_event("drop", {"dataTransfer": transfer})
    expect(page.get_by_role("heading", name="RLHF Online, 30 prompts, ready")).to_be_visible()
    expect(page.get_by_text("dropped.jsonl").first).to_be_visible()


def test_a_file_that_is_too_large_is_not_sent(browse: Open, service: Service, tmp_path: Path) -> None:
    service.upload_limit = 100
    page = browse().open("#/new/data")
    upload(page, file(tmp_path, "large.jsonl", PROMPTS))
    expect(page.get_by_role("alert")).to_contain_text("large.jsonl has 1.1 KiB, the limit is 100 B")
    assert service.datasets == {}


@pytest.mark.parametrize("name", ["prompts.json", "prompts.csv", "prompts.gz"])
def test_a_file_of_another_kind_is_not_sent(browse: Open, service: Service, tmp_path: Path, name: str) -> None:
    page = browse().open("#/new/data")
    expect(page.locator("input[type=file]")).to_have_attribute("accept", ".jsonl,.gz,.parquet")
    upload(page, file(tmp_path, name, PROMPTS))
    expect(page.get_by_role("alert")).to_contain_text(f"{name} is not one of .jsonl, .jsonl.gz, .parquet.")
    assert service.datasets == {}


def test_bad_lines_can_be_left_out(browse: Open, tmp_path: Path) -> None:
    page = browse().open("#/new/data")
    upload(page, file(tmp_path, "some.jsonl", PROMPTS + 'not json\n{"prompt": ""}\n{"prompt": 5}\n'))
    expect(page.get_by_role("heading", name=re.compile("RLHF Online, .*, not ready"))).to_be_visible()
    expect(page.get_by_text("or train without 3 bad lines")).to_be_visible()
    page.get_by_role("button", name="Leave bad lines out").click()
    expect(page.get_by_role("heading", name=re.compile("RLHF Online, .*, ready"))).to_be_visible()
    expect(page.get_by_text("3 bad lines are left out")).to_be_visible()
    drafted(page, "data", {"prompts": str(tmp_path / "ds-1.jsonl"), "skip_invalid": True})
    page.get_by_role("button", name="Take that back").click()
    expect(page.get_by_role("heading", name=re.compile("RLHF Online, .*, not ready"))).to_be_visible()


def test_a_dataset_is_removed_only_when_meant_and_unused(browse: Open, service: Service, tmp_path: Path) -> None:
    watched = browse()
    watched.expected = ["409"]
    page = watched.open("#/new/data")
    upload(page, file(tmp_path, "prompts.jsonl", PROMPTS))
    service.used = {"ds-1"}
    page.get_by_role("button", name="Remove").click()
    dialog = page.get_by_role("dialog", name="Remove prompts.jsonl?")
    dialog.get_by_role("button", name="Remove").click()
    expect(dialog.get_by_role("alert")).to_contain_text("the run going reads this dataset")
    dialog.get_by_role("button", name="Keep it").click()
    expect(page.get_by_role("heading", name="RLHF Online, 30 prompts, ready")).to_be_visible()
    service.used = set()
    page.get_by_role("button", name="Remove").click()
    dialog.get_by_role("button", name="Remove").click()
    expect(page.get_by_role("heading", name="RLHF Online, 30 prompts, ready")).to_have_count(0)
    assert service.datasets == {}


def test_an_upload_goes_on_while_one_looks_elsewhere(browse: Open, service: Service, tmp_path: Path) -> None:
    service.taking.clear()
    service.reading.clear()
    page = browse().open("#/new/data")
    upload(page, file(tmp_path, "large.jsonl", PROMPTS * 20_000))
    expect(page.get_by_text("Uploading large.jsonl")).to_be_visible()
    page.get_by_role("link", name="Runs", exact=True).click()
    expect(page.get_by_role("heading", name="No runs yet")).to_be_visible()
    page.go_back()
    expect(page.get_by_text("Uploading large.jsonl")).to_be_visible()
    expect(page.get_by_role("button", name="Stop")).to_be_enabled()
    service.taking.set()
    expect(page.get_by_text("Reading large.jsonl")).to_be_visible()
    page.get_by_role("link", name="Model").first.click()
    service.reading.set()
    drafted(page, "data", {"prompts": str(tmp_path / "ds-1.jsonl")})
    page.get_by_role("link", name="Dataset").click()
    expect(page.get_by_role("heading", name="RLHF Online, 600,000 prompts, ready")).to_be_visible()


@pytest.mark.parametrize("when", ["Uploading", "Reading"])
def test_an_upload_that_is_stopped_leaves_nothing(browse: Open, service: Service, tmp_path: Path, when: str) -> None:
    """Also where the server has the file whole already, and would make a dataset of it."""
    (service.taking if when == "Uploading" else service.reading).clear()
    page = browse().open("#/new/data")
    upload(page, file(tmp_path, "large.jsonl", PROMPTS * 20_000))
    expect(page.get_by_text(f"{when} large.jsonl")).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    if when == "Reading":
        expect(page.get_by_text("Stopping large.jsonl")).to_be_visible()
        service.reading.set()
    expect(page.get_by_role("heading", name="Drop a file of prompts here")).to_be_visible()
    expect(page.get_by_text("large.jsonl")).to_have_count(0)
    service.taking.set()
    assert service.datasets == {}


def test_responses_can_be_left_out(browse: Open, tmp_path: Path) -> None:
    page = browse().open("#/new/data")
    upload(page, file(tmp_path, "sft.jsonl", '{"prompt": "a", "response": "b"}\n'))
    expect(page.get_by_role("heading", name="Prompts with responses (SFT), 1 prompt, not ready")).to_be_visible()
    page.get_by_role("button", name="Use the prompts only").click()
    expect(page.get_by_role("heading", name="Prompts with responses (SFT), 1 prompt, ready")).to_be_visible()


def test_wrong_settings_are_told_at_the_field_and_cannot_be_started(browse: Open) -> None:
    page = browse().open("#/new/settings")
    steps = page.get_by_label("Steps", exact=True)
    steps.fill("-3")
    expect(steps).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#f-train-steps-error")).to_contain_text("≥ 1")
    rate = page.get_by_label("Learning rate", exact=True)
    rate.fill("fast")
    expect(page.locator("#f-train-learning_rate-error")).to_contain_text("fast")
    expect(page.get_by_role("radio", name=re.compile("^PPO"))).to_be_enabled()
    page.get_by_role("link", name="Review", exact=True).last.click()
    expect(page.get_by_role("button", name="Start training")).to_be_disabled()
    expect(page.get_by_role("alert").first).to_contain_text("train.steps")


def test_what_the_schema_offers_is_offered(browse: Open, service: Service) -> None:
    """Another schema, as further algorithms would make it: told apart by type, with a section that may be null."""
    teacher = {"type": "object", "properties": {"model": {"type": "string"}}, "required": ["model"]}
    lora = {"type": "object", "properties": {"r": {"type": "integer", "minimum": 1, "default": 16}}}
    schema = json.loads(json.dumps(service.schema))
    grpo = schema["properties"]["algorithm"]["discriminator"]["mapping"]["grpo"]
    gkd = {"type": "object", "properties": {"type": {"const": "gkd"}, "teacher": {"$ref": "#/$defs/Teacher"}}}
    schema["$defs"] |= {"Teacher": teacher, "Lora": lora, "GKD": gkd | {"required": ["teacher"]}}
    schema["properties"]["algorithm"] = {
        "discriminator": {"mapping": {"grpo": grpo, "gkd": "#/$defs/GKD"}, "propertyName": "type"},
        "oneOf": [{"$ref": grpo}, {"$ref": "#/$defs/GKD"}],
    }
    policy = schema["$defs"]["PolicyConfig"]["properties"]
    policy["train_type"] = {"enum": ["full", "lora"], "default": "full", "type": "string"}
    policy["lora"] = {"anyOf": [{"$ref": "#/$defs/Lora"}, {"type": "null"}], "default": None}
    service.schema = schema
    page = browse().open("#/new/settings")
    expect(page.get_by_role("radio", name=re.compile("^PPO"))).to_be_disabled()
    teacher = page.get_by_role("group", name="The teacher")
    expect(teacher).to_have_count(0)
    page.get_by_role("radio", name=re.compile("^GKD")).check()
    teacher.get_by_label("Or a path, an address or a hub id").fill("/srv/models/teacher")
    expect(page.get_by_label("KL coefficient", exact=True)).to_have_count(0)
    page.get_by_role("radio", name=re.compile("^LoRA")).check()
    page.locator("summary").get_by_text("Model", exact=True).click()
    page.get_by_label("Lora", exact=True).check()
    page.get_by_label("Lora, r", exact=True).fill("32")
    expect(page.get_by_label("Lora, r", exact=True)).to_have_value("32")
    drafted(page, "algorithm", {"type": "gkd", "teacher": {"model": "/srv/models/teacher"}})
    drafted(page, "policy", {"train_type": "lora", "lora": {"r": 32}})


def test_rewards_of_each_kind(browse: Open) -> None:
    page = browse().open("#/new/model")
    page.get_by_role("radio", name=re.compile("helpful-rm")).check()
    page.get_by_label("Use of correct").select_option("trained")
    page.get_by_text("A server that scores over HTTP").click()
    page.get_by_label("Its address").fill("judge")
    expect(page.get_by_role("alert")).to_contain_text("expected http://")
    page.get_by_label("Its address").fill("http://judge:8000/score")
    expect(page.get_by_role("alert")).to_have_count(0)
    server = {"type": "http", "url": "http://judge:8000/score"}
    function = {"type": "function", "path": "/srv/rewards/rules.py:correct"}
    drafted(page, "rewards", [{"type": "model", "model": "/srv/models/helpful-rm"}, function, server])
    page.get_by_role("radio", name=re.compile("^None")).check()
    page.get_by_label("Use of correct").select_option("off")
    drafted(page, "rewards", [server])


def test_a_wrong_token(browse: Open, service: Service, runs: dict[str, str]) -> None:
    service.token = "correct horse battery"
    watched = browse()
    watched.expected = ["401"]
    page = watched.open()
    expect(page.get_by_role("heading", name="A token, please")).to_be_visible()
    page.get_by_label("Token").fill("wrong")
    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_role("alert")).to_have_text("The token is not right.")
    page.get_by_label("Token").fill(service.token)
    page.keyboard.press("Enter")
    expect(page.get_by_role("link", name="good")).to_be_visible()
    page.get_by_role("link", name="going").click()
    expect(page.get_by_text("live", exact=True)).to_be_visible()


def test_a_run_that_fails(browse: Open, service: Service, runs: dict[str, str]) -> None:
    service.error_of_next_run = {
        "role": "learner",
        "rank": 1,
        "phase": "train",
        "type": "RuntimeError",
        "message": "CUDA error: an illegal memory access was encountered",
        "log": "logs/learner-0.log",
    }
    page = browse().open(f"#/runs/{runs['good']}")
    page.get_by_role("button", name="Clone").click()
    page.get_by_label("Name").fill("doomed")
    page.get_by_role("button", name="Start the clone").click()
    expect(page.get_by_role("heading", name="doomed")).to_be_visible()
    expect(page.locator(".run-head .state")).to_have_text("failed")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("learner 1, phase train: RuntimeError")
    expect(alert).to_contain_text("illegal memory access")
    alert.get_by_role("link").click()
    expect(page.get_by_label("File")).to_have_value("learner-0.log")
    expect(page.get_by_label("Log learner-0.log")).to_contain_text("step 199")


def test_the_doctors_remedy_clones_the_run(browse: Open, service: Service, runs: dict[str, str]) -> None:
    page = browse().open(f"#/runs/{runs['fast']}")
    page.get_by_role("link", name="What to do").click()
    finding = page.get_by_role("article", name="The policy is far from where it began")
    expect(finding).to_contain_text("0.644 nats per token")
    finding.get_by_role("button", name="Clone with the change").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("row", name=re.compile("train.learning_rate"))).to_contain_text("2.5e-4")
    dialog.get_by_role("button", name="Start the clone").click()
    expect(page.locator(".run-head .state")).to_have_text("succeeded")
    (clone,) = [body for path, body in service.bodies if path.endswith("/clone")]
    assert clone["changes"] == {"algorithm.kl.coef": 0.05, "train.learning_rate": 0.00025}


def test_an_edited_clone_keeps_what_the_page_cannot_see(browse: Open, service: Service) -> None:
    """A run's secrets are shown as ***, and only a clone may keep them: it is planned and started as changes."""
    rewards = [
        {"type": "model", "model": "/srv/models/preference-rm"},
        {"type": "function", "path": "/home/anna/rules.py:short"},
        {"type": "http", "url": "https://me:pass@judge/score"},
    ]
    fast = config_tree(name="fast", rewards=rewards, train={"steps": 12, "learning_rate": 5e-4})
    service.add_run("20260130-2-fast", recorded("rate_too_high"), "stopped", config=fast)
    page = browse().open("#/runs/20260130-2-fast")
    page.get_by_role("button", name="Clone").click()
    page.get_by_role("button", name="Edit settings first").click()
    rate = page.get_by_label("Learning rate", exact=True)
    expect(rate).to_have_value("5e-4")
    rate.fill("1e-5")
    page.get_by_label("Temperature", exact=True).fill("")
    page.get_by_role("link", name="Model").first.click()
    expect(page.get_by_label("Its address")).to_have_value("https://***@judge/score")
    page.get_by_label("Use of short").select_option("watched")
    page.get_by_role("link", name="Review").click()
    expect(page.get_by_text("A clone of fast")).to_be_visible()
    expect(page.get_by_role("row", name=re.compile("train.learning_rate"))).to_contain_text("1e-5")
    page.get_by_label("What is the run called?").fill("calmer")
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_role("heading", name="calmer")).to_be_visible()
    (sent,) = [body for path, body in service.bodies if path.endswith("/clone")]
    assert "***" not in json.dumps(sent)
    (made,) = [held["config"] for held in service.runs.values() if held["run"]["name"] == "calmer"]
    assert [made["train"]["learning_rate"], made["sampling"]["temperature"], made["rewards"][1]["weight"]] == [1e-5, 1, 0]
    assert made["rewards"][2]["url"] == "https://me:pass@judge/score"


def test_a_draft_is_neither_lost_nor_kept_against_ones_will(browse: Open, runs: dict[str, str]) -> None:
    page = browse().open("#/new/model")
    expect(page.get_by_role("button", name="Discard")).to_have_count(0)
    page.get_by_role("radio", name=re.compile("llama-3.2-1b-instruct")).check()
    drafted(page, "policy", {"model": "/srv/models/llama-3.2-1b-instruct"})
    page.goto(page.url.split("#")[0] + f"#/runs/{runs['fast']}")
    page.get_by_role("button", name="Clone").click()
    page.get_by_role("button", name="Edit settings first").click()
    expect(page.get_by_role("alert")).to_contain_text("There is a draft of a new run that was not started.")
    page.get_by_role("button", name="Replace the draft").click()
    expect(page.get_by_label("Learning rate", exact=True)).to_have_value("5e-4")
    page.get_by_role("button", name="Discard").click()
    page.get_by_role("dialog").get_by_role("button", name="Discard").click()
    expect(page.get_by_role("group", name="The model to train")).to_contain_text("Choose the model to train.")
    expect(page.get_by_text("A clone of fast")).to_have_count(0)
    expect(page.get_by_role("button", name="Discard")).to_have_count(0)


def test_stop_pause_and_delete(browse: Open, service: Service, runs: dict[str, str]) -> None:
    page = browse().open(f"#/runs/{runs['going']}")
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("dialog").get_by_role("button", name="Stop").click()
    expect(page.locator(".run-head .state")).to_have_text("stopped")
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("dialog", name="Delete going?")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert runs["going"] in service.runs
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete for good").click()
    expect(page.get_by_role("heading", name="Runs")).to_be_visible()
    expect(page.get_by_role("link", name="going")).to_have_count(0)
    assert runs["going"] not in service.runs


def test_samples(browse: Open, runs: dict[str, str]) -> None:
    page = browse().open(f"#/runs/{runs['good']}/samples?step=7")
    expect(page.get_by_text("24 answers of step 7")).to_be_visible()
    page.get_by_label("Search prompts and answers").fill("350")
    expect(page.get_by_text("6 answers of step 7")).to_be_visible()
    page.get_by_label("Search prompts and answers").fill("")
    page.get_by_label("Sort by").select_option("reward")
    page.get_by_role("button", name="Highest first").click()
    expect(page.get_by_role("article").first).to_contain_text("reward −1.3")
    page.get_by_role("article").first.get_by_role("button", name="Tokens").click()
    tinted = page.get_by_label("Tokens, tinted by KL against the reference").locator("span")
    expect(tinted).to_have_count(11)
    assert [tinted.nth(i).get_attribute("class") for i in (0, 2, 4, 6, 7)] == ["", "q2", "q3", "n1", "q4"]


def test_samples_of_a_running_run_stay_while_steps_come(
    browse: Open, server: StandIn, service: Service, runs: dict[str, str]
) -> None:
    """What the picker says is what is shown; the newest step is a button away."""
    page = browse().open(f"#/runs/{runs['going']}/samples")
    expect(page.get_by_text("24 answers of step 34")).to_be_visible()
    row = recorded("healthy")[34]
    service.runs[runs["going"]]["metrics"].append(row)
    service.runs[runs["going"]]["run"]["state"] = "paused"
    server.tick.set()  # ends the stream, and the page looks again
    expect(page.get_by_role("button", name="Newest (35)")).to_be_visible()
    expect(page.get_by_role("combobox", name="Step")).to_have_value("34")
    page.get_by_role("button", name="Newest (35)").click()
    expect(page.get_by_text("24 answers of step 35")).to_be_visible()
    expect(page.get_by_role("combobox", name="Step")).to_have_value("35")


def test_evidence_is_shown_wherever_it_lies(browse: Open, service: Service, runs: dict[str, str]) -> None:
    service.groups = 300  # its sample is the last of 1,200, and the server gives a thousand at once
    page = browse(height=500).open(f"#/runs/{runs['good']}/samples?step=7&sample=7-299-3")
    expect(page.get_by_text("The 4 answers to the prompt of sample 7-299-3, of step 7")).to_be_visible()
    expect(page.get_by_role("article", name="Answer 7-299-3")).to_be_in_viewport()
    expect(page.get_by_role("article")).to_have_count(4)
    page.get_by_role("button", name="Show all answers").click()
    expect(page.get_by_text("1,200 answers of step 7")).to_be_visible()


def test_long_prompts_are_shown_whole_only_when_asked(browse: Open, service: Service, runs: dict[str, str]) -> None:
    service.prompt = "A long story. " * 1000
    page = browse().open(f"#/runs/{runs['good']}/samples")
    group = page.get_by_role("region", name="Prompt 0")
    expect(group.get_by_text("advantage +1.1")).to_be_visible()
    low = group.bounding_box()
    group.get_by_role("button", name="Show all, 14,015 characters").click()
    expect(group.get_by_role("button", name="Show less")).to_be_visible()
    high = group.bounding_box()
    assert low and high
    assert low["height"] < 700 < high["height"]


def test_only_the_curves_that_a_run_has_are_drawn(browse: Open, service: Service) -> None:
    ranks = [row | {"adalora/rank_mean": 8 - row["step"] / 40, "adalora/budget": 200} for row in recorded("healthy")]
    service.add_run("20260131-1-plain", recorded("healthy"), "succeeded")
    service.add_run("20260131-2-ranks", ranks, "succeeded")
    page = browse().open("#/runs/20260131-2-ranks")
    expect(page.get_by_role("img", name=re.compile("^Ranks of the adapter, 80 points"))).to_be_visible()
    page.goto(page.url.replace("2-ranks", "1-plain"))
    expect(page.get_by_role("img", name=re.compile("^KL divergence"))).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("^(Ranks of the adapter|Replaced groups|Critic)"))).to_have_count(0)


def test_runs_are_compared(browse: Open, runs: dict[str, str]) -> None:
    page = browse().open()
    page.get_by_label(re.compile("Compare good")).check()
    page.get_by_label(re.compile("Compare fast")).check()
    page.get_by_role("link", name="Compare", exact=True).click()
    expect(page.get_by_role("img", name=re.compile("^Reward, 80 points.*good.*fast"))).to_be_visible()
    expect(page.get_by_role("row", name=re.compile("train.learning_rate"))).to_contain_text("5e-4")


def test_a_server_that_goes_and_comes_back(
    browse: Open, server: StandIn, service: Service, runs: dict[str, str]
) -> None:
    """The events break off and requests fail; the page says so, and goes on when they answer again."""
    watched = browse()
    watched.expected = ["ERR_FAILED", "Failed to load resource"]
    page = watched.open(f"#/runs/{runs['going']}")
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    page.route("**/api/**", lambda route: route.abort())
    server.tick.set()  # ends the stream
    service.runs[runs["going"]]["run"]["state"] = "paused"
    expect(page.get_by_text("the server does not answer; trying again")).to_be_visible()
    page.unroute("**/api/**")
    expect(page.locator(".run-head .state")).to_have_text("paused", timeout=20_000)


def test_more_tabs_than_a_browser_has_connections(
    browse: Open, server: StandIn, service: Service, runs: dict[str, str]
) -> None:
    """Six connections to one server are all that a browser opens; a tab that is hidden must hold none of them."""
    watched = browse()
    hide = "(hidden) => { window.isHidden = hidden; document.dispatchEvent(new Event('visibilitychange')); }"
    tabs = [watched.page, *(watched.page.context.new_page() for _ in range(7))]
    for tab in tabs:
        tab.add_init_script("Object.defineProperty(document, 'hidden', {get: () => window.isHidden === true})")
        tab.goto(f"{server.url}/#/runs/{runs['going']}")
        expect(tab.get_by_text("live", exact=True)).to_be_visible()
        tab.evaluate(hide, True)
    row = recorded("healthy")[34]
    service.runs[runs["going"]]["metrics"].append(row)
    service.runs[runs["going"]]["run"]["step"] = row["step"]
    tabs[0].evaluate(hide, False)
    expect(tabs[0].get_by_text(f"Step {row['step']} of 80")).to_be_visible()
    expect(tabs[0].get_by_role("img", name=re.compile(r"^Reward, 35 points to step 35"))).to_be_visible()


def test_what_is_not_chosen_yet_is_said_where_it_is_chosen(browse: Open, service: Service, tmp_path: Path) -> None:
    """In plain words, in red only once somebody has gone past it; a step is ticked when it was seen and is right."""
    page = browse().open("#/new/model")
    steps = page.get_by_role("navigation", name="The four steps")
    model = page.get_by_role("group", name="The model to train")
    judge = page.get_by_role("group", name="The reward model")
    expect(model).to_contain_text("Choose the model to train.")
    expect(judge).to_contain_text("Choose a reward model or a function")
    expect(page.get_by_role("alert")).to_have_count(0)
    page.get_by_role("radio", name=re.compile("qwen3-0.6b-sft")).check()
    expect(model).not_to_contain_text("Choose the model to train.")
    page.get_by_role("link", name="Go on").click()
    expect(page.get_by_role("heading", name="Drop a file of prompts here")).to_be_visible()
    expect(steps.get_by_role("link", name=re.compile("Done"))).to_have_count(0)

    upload(page, file(tmp_path, "prompts.jsonl", PROMPTS))
    expect(page.get_by_role("heading", name="RLHF Online, 30 prompts, ready")).to_be_visible()
    page.get_by_role("link", name="Model").click()
    expect(steps.get_by_role("link", name=re.compile("Done"))).to_have_text("Done:Dataset")
    expect(judge.get_by_role("alert")).to_contain_text("Choose a reward model or a function")
    expect(judge.get_by_role("textbox")).to_have_attribute("aria-invalid", "true")
    page.get_by_role("radio", name=re.compile("preference-rm")).check()
    expect(page.get_by_role("alert")).to_have_count(0)
    page.get_by_role("link", name="Go on").click()
    expect(steps.get_by_role("link", name=re.compile("Done"))).to_have_text("Done:Model")


def test_the_review_says_plainly_what_is_missing(browse: Open) -> None:
    page = browse().open("#/new/review")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("3 problems to mend first")
    expect(alert).to_contain_text("Dataset: Choose a file of prompts.")
    expect(alert).not_to_contain_text("expected section")
    expect(page.get_by_text("It can start when these steps are right: model, dataset.")).to_be_visible()


def test_a_warning_is_said_calmly_and_hinders_nothing(browse: Open, service: Service, tmp_path: Path) -> None:
    service.warnings = [
        {"path": "train.learning_rate", "message": "high for a full fine-tune; `1e-6` is usual"},
        {"path": "train.weight_decay", "message": "is seldom of use"},
    ]
    page = browse().open("#/new/model")
    page.get_by_role("radio", name=re.compile("qwen3-0.6b-sft")).check()
    page.get_by_role("radio", name=re.compile("preference-rm")).check()
    page.get_by_role("link", name="Go on").click()
    upload(page, file(tmp_path, "prompts.jsonl", PROMPTS))
    expect(page.get_by_role("heading", name="RLHF Online, 30 prompts, ready")).to_be_visible()
    page.get_by_role("link", name="Go on").click()
    rate = page.get_by_label("Learning rate", exact=True)
    expect(rate).to_have_accessible_description(re.compile("high for a full fine-tune; 1e-6 is usual"))
    expect(rate).not_to_have_attribute("aria-invalid", "true")
    expect(page.locator("summary", has_text="Training")).to_contain_text("1 note")
    page.get_by_role("link", name="Review", exact=True).last.click()
    expect(page.get_by_text("Unusual, but it can start")).to_be_visible()
    expect(page.get_by_text("high for a full fine-tune")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.get_by_role("button", name="Start training")).to_be_enabled()


def test_any_field_may_have_a_recommended_range(browse: Open, service: Service) -> None:
    schema = json.loads(json.dumps(service.schema))
    for section in schema["$defs"].values():
        if "learning_rate" in section.get("properties", {}):
            section["properties"]["learning_rate"]["recommended"] = [1e-7, 5e-6]
    service.schema = schema
    page = browse().open("#/new/settings")
    expect(page.get_by_label("Learning rate", exact=True)).to_have_accessible_description(
        re.compile("recommended 1e-7 to 5e-6")
    )


def test_the_review_says_why_it_cannot_start_yet(browse: Open, service: Service) -> None:
    service.planning.clear()
    page = browse().open("#/new/review")
    expect(page.get_by_role("button", name="Start training")).to_be_disabled()
    expect(page.get_by_role("status").get_by_text("Checking…")).to_be_visible()
    service.planning.set()
    expect(page.get_by_text("It can start when these steps are right")).to_be_visible()
    expect(page.get_by_text("Checking…")).to_have_count(0)


def test_a_model_says_what_it_is(browse: Open) -> None:
    page = browse().open("#/new/model")
    card = page.get_by_role("radio", name=re.compile("qwen3-0.6b-sft"))
    expect(card).to_have_accessible_name(re.compile("vocabulary 151,936 · context 40,960 tokens · chat template"))


def test_only_what_a_run_allows_is_offered(browse: Open, service: Service, runs: dict[str, str]) -> None:
    """A run that cannot be paused says so by its actions."""
    service.allowed = ["stop", "clone"]
    page = browse().open(f"#/runs/{runs['going']}")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("button", name="Clone")).to_be_visible()
    expect(page.get_by_role("button", name="Pause")).to_have_count(0)
    expect(page.get_by_role("button", name="Delete")).to_have_count(0)
    expect(page.get_by_role("link", name="Chat")).to_have_count(0)


def test_a_teacher_is_chosen_like_any_model(browse: Open) -> None:
    page = browse().open("#/new/settings")
    page.get_by_role("radio", name=re.compile("^GKD")).check()
    teacher = page.get_by_role("group", name="The teacher")
    expect(teacher).to_contain_text("Choose the teacher")
    expect(page.get_by_role("alert")).to_have_count(0)
    page.get_by_role("link", name="Review", exact=True).last.click()
    expect(page.get_by_role("alert")).to_contain_text("Settings: Choose the teacher")
    page.get_by_role("link", name="Settings").first.click()
    expect(teacher.get_by_role("alert")).to_contain_text("Choose the teacher")
    expect(teacher.get_by_role("textbox")).to_have_attribute("aria-invalid", "true")
    teacher.get_by_role("radio", name=re.compile("llama-3.2-1b-instruct")).check()
    expect(page.get_by_role("alert")).to_have_count(0)
    drafted(page, "algorithm", {"type": "gkd", "teacher": {"model": "/srv/models/llama-3.2-1b-instruct"}})


def test_a_missing_section_is_told_at_the_field_that_it_needs(browse: Open, service: Service) -> None:
    """Of a schema with a section that must be there: the plan names the section, the page shows a field."""
    schema = json.loads(json.dumps(service.schema))
    schema["$defs"]["Judge"] = {
        "type": "object",
        "properties": {"level": {"type": "integer"}, "note": {"type": "string", "default": ""}},
        "required": ["level"],
    }
    schema["properties"]["judge"] = {"$ref": "#/$defs/Judge"}
    service.schema = schema
    service.more_problems = [{"path": "judge", "message": "required, but missing; expected section (level, note)"}]
    page = browse().open("#/new/settings")
    page.locator("summary").get_by_text("judge").click()
    expect(page.get_by_label("Level", exact=True)).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#f-judge-level-error")).to_have_text("A value is needed here.")
    expect(page.get_by_label("Note", exact=True)).not_to_have_attribute("aria-invalid", "true")


@pytest.mark.parametrize(
    ("state", "fields", "words"),
    [
        ("queued", {"queue": {"position": 2, "reason": "needs 2 GPUs"}}, "The run waits for its turn."),
        ("queued", {"queue": {"position": 0, "reason": "it is starting"}}, "Models are being loaded"),
        ("paused", {}, "The run was paused before its first step."),
        ("running", {}, "Models are being loaded"),
    ],
)
def test_why_there_are_no_curves_yet(
    browse: Open, service: Service, state: str, fields: dict[str, object], words: str
) -> None:
    service.add_run("20260131-1-new", [], state, **fields)
    expect(browse().open("#/runs/20260131-1-new").get_by_text(words)).to_be_visible()


def test_a_comparison_goes_on_without_a_run_that_is_gone(browse: Open, runs: dict[str, str]) -> None:
    watched = browse()
    watched.expected = ["404"]
    page = watched.open(f"#/compare?ids={runs['good']},20260101-gone,{runs['fast']}")
    expect(page.get_by_text("20260101-gone is not there any more.")).to_be_visible()
    expect(page.get_by_role("heading", name="Compare 2 runs")).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("^Reward, 80 points.*good.*fast"))).to_be_visible()
