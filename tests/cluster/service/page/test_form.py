"""The form of a new run in a real Chromium: its steps, drafts, and how it shows what is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.support.browser import Open
from tests.support.page_forms import PROMPTS, drafted, file, upload
from tests.support.page_state import Service, config_tree, recorded

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def test_wrong_settings_are_shown_at_the_field_and_cannot_be_started(browse: Open) -> None:
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
    """Another schema, as more algorithms would make it: by type, with a section that may be null."""
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
    teacher = page.get_by_role("group", name="Teacher")
    expect(teacher).to_have_count(0)
    page.get_by_role("radio", name=re.compile("^GKD")).check()
    teacher.get_by_label("Or a path, a URL or a hub id").fill("/srv/models/teacher")
    expect(page.get_by_label("KL coefficient", exact=True)).to_have_count(0)
    page.get_by_role("radio", name=re.compile("^LoRA")).check()
    page.locator("summary").get_by_text("Model", exact=True).click()
    page.get_by_label("LoRA", exact=True).check()
    page.get_by_label("LoRA rank (r)", exact=True).fill("32")
    expect(page.get_by_label("LoRA rank (r)", exact=True)).to_have_value("32")
    drafted(page, "algorithm", {"type": "gkd", "teacher": {"model": "/srv/models/teacher"}})
    drafted(page, "policy", {"train_type": "lora", "lora": {"r": 32}})


def test_rewards_of_each_kind(browse: Open) -> None:
    page = browse().open("#/new/model")
    page.get_by_role("radio", name=re.compile("helpful-rm")).check()
    page.get_by_label("Use of correct").select_option("trained")
    page.get_by_text("HTTP reward server").click()
    page.get_by_label("URL", exact=True).fill("judge")
    expect(page.get_by_role("alert")).to_contain_text("expected http://")
    page.get_by_label("URL", exact=True).fill("http://judge:8000/score")
    expect(page.get_by_role("alert")).to_have_count(0)
    server = {"type": "http", "url": "http://judge:8000/score"}
    function = {"type": "function", "path": "/srv/rewards/rules.py:correct"}
    drafted(page, "rewards", [{"type": "model", "model": "/srv/models/helpful-rm"}, function, server])
    page.get_by_role("radio", name=re.compile("^None")).check()
    page.get_by_label("Use of correct").select_option("off")
    drafted(page, "rewards", [server])


def test_an_edited_clone_keeps_what_the_page_cannot_see(browse: Open, service: Service) -> None:
    """A run's secrets are shown as ***, and only a clone may keep them: it is planned and started as changes."""
    rewards = [
        {"type": "model", "model": "/srv/models/preference-rm"},
        {"type": "function", "path": "/srv/elsewhere/rules.py:short"},
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
    expect(page.get_by_label("URL", exact=True)).to_have_value("https://***@judge/score")
    page.get_by_label("Use of short").select_option("watched")
    page.get_by_role("link", name="Review").click()
    expect(page.get_by_text("Clone of fast")).to_be_visible()
    expect(page.get_by_role("row", name=re.compile("train.learning_rate"))).to_contain_text("1e-5")
    page.get_by_label("Run name").fill("calmer")
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_role("heading", name="calmer")).to_be_visible()
    (sent,) = [body for path, body in service.bodies if path.endswith("/clone")]
    assert "***" not in json.dumps(sent)
    (made,) = [held["config"] for held in service.runs.values() if held["run"]["name"] == "calmer"]
    assert (made["train"]["learning_rate"], made["sampling"]["temperature"]) == (1e-5, 1)
    assert made["rewards"][1]["weight"] == 0
    assert made["rewards"][2]["url"] == "https://me:pass@judge/score"


def test_a_draft_is_neither_lost_nor_kept_against_ones_will(browse: Open, runs: dict[str, str]) -> None:
    page = browse().open("#/new/model")
    expect(page.get_by_role("button", name="Discard")).to_have_count(0)
    page.get_by_role("radio", name=re.compile("llama-3.2-1b-instruct")).check()
    drafted(page, "policy", {"model": "/srv/models/llama-3.2-1b-instruct"})
    page.goto(page.url.split("#")[0] + f"#/runs/{runs['fast']}")
    page.get_by_role("button", name="Clone").click()
    page.get_by_role("button", name="Edit settings first").click()
    expect(page.get_by_role("alert")).to_contain_text("You have a draft of a new run.")
    page.get_by_role("button", name="Replace draft").click()
    expect(page.get_by_label("Learning rate", exact=True)).to_have_value("5e-4")
    page.get_by_role("button", name="Discard").click()
    page.get_by_role("dialog").get_by_role("button", name="Discard").click()
    expect(page.get_by_role("group", name="The model to train")).to_contain_text("Choose the model to train.")
    expect(page.get_by_text("Clone of fast")).to_have_count(0)
    expect(page.get_by_role("button", name="Discard")).to_have_count(0)


def test_what_is_not_chosen_yet_is_shown_where_it_is_chosen(browse: Open, service: Service, tmp_path: Path) -> None:
    """In plain words, in red only once somebody has gone past it; a step is ticked when it was seen and is right."""
    page = browse().open("#/new/model")
    steps = page.get_by_role("navigation", name="Form steps")
    model = page.get_by_role("group", name="The model to train")
    judge = page.get_by_role("group", name="The reward model")
    expect(model).to_contain_text("Choose the model to train.")
    expect(judge).to_contain_text("Choose a reward model or a reward function")
    expect(page.get_by_role("alert")).to_have_count(0)
    page.get_by_role("radio", name=re.compile("qwen3-0.6b-sft")).check()
    expect(model).not_to_contain_text("Choose the model to train.")
    page.get_by_role("link", name="Continue").click()
    expect(page.get_by_role("heading", name="Drop a prompt file here")).to_be_visible()
    expect(steps.get_by_role("link", name=re.compile("Done"))).to_have_count(0)

    upload(page, file(tmp_path, "prompts.jsonl", PROMPTS))
    expect(page.get_by_role("heading", name="RLHF Online, 30 prompts, ready")).to_be_visible()
    page.get_by_role("link", name="Model").click()
    expect(steps.get_by_role("link", name=re.compile("Done"))).to_have_text("Done:Dataset")
    expect(judge.get_by_role("alert")).to_contain_text("Choose a reward model or a reward function")
    expect(judge.get_by_role("textbox")).to_have_attribute("aria-invalid", "true")
    page.get_by_role("radio", name=re.compile("preference-rm")).check()
    expect(page.get_by_role("alert")).to_have_count(0)
    page.get_by_role("link", name="Continue").click()
    expect(steps.get_by_role("link", name=re.compile("Done"))).to_have_text("Done:Model")


def test_the_review_lists_what_is_missing(browse: Open) -> None:
    page = browse().open("#/new/review")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("3 problems to fix")
    expect(alert).to_contain_text("Dataset: Choose a prompt file.")
    expect(alert).not_to_contain_text("expected section")
    expect(page.get_by_text("Fix Model and Dataset to start.")).to_be_visible()


def test_a_warning_is_shown_calmly_and_blocks_nothing(browse: Open, service: Service, tmp_path: Path) -> None:
    service.warnings = [
        {"path": "train.learning_rate", "message": "high for a full fine-tune; `1e-6` is usual"},
        {"path": "train.weight_decay", "message": "is seldom of use"},
    ]
    page = browse().open("#/new/model")
    page.get_by_role("radio", name=re.compile("qwen3-0.6b-sft")).check()
    page.get_by_role("radio", name=re.compile("preference-rm")).check()
    page.get_by_role("link", name="Continue").click()
    upload(page, file(tmp_path, "prompts.jsonl", PROMPTS))
    expect(page.get_by_role("heading", name="RLHF Online, 30 prompts, ready")).to_be_visible()
    page.get_by_role("link", name="Continue").click()
    rate = page.get_by_label("Learning rate", exact=True)
    expect(rate).to_have_accessible_description(re.compile("high for a full fine-tune; 1e-6 is usual"))
    expect(rate).not_to_have_attribute("aria-invalid", "true")
    expect(page.locator("summary", has_text="Training")).to_contain_text("1 note")
    page.get_by_role("link", name="Review", exact=True).last.click()
    expect(page.get_by_text("Worth a look")).to_be_visible()
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


def test_the_review_shows_why_it_cannot_start_yet(browse: Open, service: Service) -> None:
    service.planning.clear()
    page = browse().open("#/new/review")
    expect(page.get_by_role("button", name="Start training")).to_be_disabled()
    expect(page.get_by_role("status").get_by_text("Checking…")).to_be_visible()
    service.planning.set()
    expect(page.get_by_text("Fix Model and Dataset to start.")).to_be_visible()
    expect(page.get_by_text("Checking…")).to_have_count(0)


def test_a_model_shows_what_it_is(browse: Open) -> None:
    page = browse().open("#/new/model")
    card = page.get_by_role("radio", name=re.compile("qwen3-0.6b-sft"))
    expect(card).to_have_accessible_name(re.compile("vocabulary 151,936 · context 40,960 tokens · chat template"))


def test_a_teacher_is_chosen_like_any_model(browse: Open) -> None:
    page = browse().open("#/new/settings")
    page.get_by_role("radio", name=re.compile("^GKD")).check()
    teacher = page.get_by_role("group", name="Teacher")
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


def test_a_missing_section_is_shown_at_the_field_that_it_needs(browse: Open, service: Service) -> None:
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
    expect(page.locator("#f-judge-level-error")).to_have_text("Required.")
    expect(page.get_by_label("Note", exact=True)).not_to_have_attribute("aria-invalid", "true")
