"""The page in a real Chromium: from an upload to a finished run, and every view of a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.support.browser import Open
from tests.support.page_forms import PROMPTS, file, upload
from tests.support.page_server import StandIn
from tests.support.page_state import Service, recorded

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def test_from_an_upload_to_a_finished_run(browse: Open, service: Service, tmp_path: Path) -> None:
    page = browse().open()
    expect(page.get_by_role("heading", name="No runs yet")).to_be_visible()
    page.get_by_role("link", name="Start your first run").click()
    page.get_by_role("radio", name=re.compile("qwen3-0.6b-sft")).check()
    page.get_by_role("radio", name=re.compile("preference-rm")).check()
    page.get_by_label("Use of correct").select_option("watched")
    page.get_by_role("link", name="Continue").click()

    upload(page, file(tmp_path, "prompts.jsonl", PROMPTS))
    expect(page.get_by_role("heading", name="RLHF Online, 30 prompts, ready")).to_be_visible()
    expect(page.get_by_text("Write haiku number 0.")).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("Prompt lengths"))).to_be_visible()
    page.get_by_role("link", name="Continue").click()

    expect(page.get_by_role("radio", name=re.compile("Online RLHF"))).to_be_checked()
    expect(page.get_by_role("radio", name=re.compile("^GRPO"))).to_be_checked()
    page.get_by_label("KL coefficient", exact=True).fill("0.08")
    page.get_by_label("Steps", exact=True).fill("12")
    page.get_by_role("link", name="Review", exact=True).last.click()

    page.get_by_label("Run name").fill("haiku")
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
    page.get_by_label("Message").fill("25 * 4 + 10 = ?")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("region", name="Trained")).to_contain_text("The answer is 110.")
    expect(page.get_by_role("region", name="Base (policy)")).to_contain_text("I like numbers.")


def test_a_chat_whose_base_is_gone(browse: Open, service: Service) -> None:
    service.add_run("20260131-1-good", recorded("healthy"), "succeeded")
    service.base_is_gone = True
    page = browse().open("#/runs/20260131-1-good/chat")
    for turn in ("25 * 4 + 10 = ?", "And 1 more?"):
        page.get_by_label("Message").fill(turn)
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("region", name="Base (policy)")).to_contain_text("no longer available: no such folder")
        expect(page.get_by_role("region", name="Trained")).to_contain_text(turn)
        expect(page.get_by_role("region", name="Trained").locator(".turn").last).to_have_text(
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
    turn = page.get_by_label("Message")
    turn.fill("25 * 4 + 10 = ?")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert")).to_contain_text("somebody else is chatting")
    expect(turn).to_have_value("25 * 4 + 10 = ?")
    expect(page.get_by_role("region", name="Trained")).to_contain_text("Send a message below")
    service.busy = False
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("region", name="Trained")).to_contain_text("The answer is 110.")
    asked = [body for path, body in service.bodies if path.endswith("/chat")]
    assert [[said["role"] for said in body["trained"]] for body in asked] == [["user"], ["user"]]


def test_a_chat_is_as_warm_as_it_was_asked_to_be(browse: Open, service: Service) -> None:
    service.add_run("20260131-1-good", recorded("healthy"), "succeeded")
    page = browse().open("#/runs/20260131-1-good/chat")
    page.get_by_text("Generation settings").click()
    temperature = page.get_by_label("Temperature")
    for typed in ("0", "0,7"):
        temperature.fill(typed)
        page.get_by_label("Message").fill("25 * 4 + 10 = ?")
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("button", name="New chat")).to_be_enabled()
    assert [body["temperature"] for path, body in service.bodies if path.endswith("/chat")] == [0, 0.7]
    temperature.fill("warm")
    expect(temperature).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_role("alert")).to_have_text("A number from 0 to 10.")
    page.get_by_label("Message").fill("And now?")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()


def test_a_wrong_token(browse: Open, service: Service, runs: dict[str, str]) -> None:
    service.token = "correct horse battery"
    watched = browse()
    watched.expected = ["401"]
    page = watched.open()
    expect(page.get_by_role("heading", name="Sign in with a token")).to_be_visible()
    page.get_by_label("Token").fill("wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_have_text("Invalid token.")
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
    page.get_by_role("button", name="Start clone").click()
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
    finding = page.get_by_role("article", name="The policy is far from the reference")
    expect(finding).to_contain_text("0.644 nats per token")
    finding.get_by_role("button", name="Clone with this change").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("row", name=re.compile("train.learning_rate"))).to_contain_text("2.5e-4")
    dialog.get_by_role("button", name="Start clone").click()
    expect(page.locator(".run-head .state")).to_have_text("succeeded")
    (clone,) = [body for path, body in service.bodies if path.endswith("/clone")]
    assert clone["changes"] == {"algorithm.kl.coef": 0.05, "train.learning_rate": 0.00025}


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
    page.get_by_role("button", name="Delete permanently").click()
    expect(page.get_by_role("heading", name="Runs")).to_be_visible()
    expect(page.get_by_role("link", name="going")).to_have_count(0)
    assert runs["going"] not in service.runs


def test_samples(browse: Open, runs: dict[str, str]) -> None:
    page = browse().open(f"#/runs/{runs['good']}/samples?step=7")
    expect(page.get_by_text("24 completions of step 7")).to_be_visible()
    page.get_by_label("Search prompts and completions").fill("350")
    expect(page.get_by_text("6 completions of step 7")).to_be_visible()
    page.get_by_label("Search prompts and completions").fill("")
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
    """What the picker shows is what is listed; the newest step is a button away."""
    page = browse().open(f"#/runs/{runs['going']}/samples")
    expect(page.get_by_text("24 completions of step 34")).to_be_visible()
    row = recorded("healthy")[34]
    service.runs[runs["going"]]["metrics"].append(row)
    service.runs[runs["going"]]["run"]["state"] = "paused"
    server.tick.set()  # ends the stream, and the page looks again
    expect(page.get_by_role("button", name="Newest (35)")).to_be_visible()
    expect(page.get_by_role("combobox", name="Step")).to_have_value("34")
    page.get_by_role("button", name="Newest (35)").click()
    expect(page.get_by_text("24 completions of step 35")).to_be_visible()
    expect(page.get_by_role("combobox", name="Step")).to_have_value("35")


def test_evidence_is_shown_wherever_it_is(browse: Open, service: Service, runs: dict[str, str]) -> None:
    service.groups = 300  # its sample is the last of 1,200, and the server gives a thousand at once
    page = browse(height=500).open(f"#/runs/{runs['good']}/samples?step=7&sample=7-299-3")
    expect(page.get_by_text("The 4 completions for the prompt of sample 7-299-3, step 7")).to_be_visible()
    expect(page.get_by_role("article", name="Completion 7-299-3")).to_be_in_viewport()
    expect(page.get_by_role("article")).to_have_count(4)
    page.get_by_role("button", name="Show all", exact=True).click()
    expect(page.get_by_text("1,200 completions of step 7")).to_be_visible()


def test_long_prompts_are_shown_in_full_only_when_asked(browse: Open, service: Service, runs: dict[str, str]) -> None:
    service.prompt = "A long story. " * 1000
    page = browse().open(f"#/runs/{runs['good']}/samples")
    group = page.get_by_role("region", name="Prompt 0")
    expect(group.get_by_text("advantage +1.1")).to_be_visible()
    low = group.bounding_box()
    group.get_by_role("button", name="Show all, 14,015 characters").click()
    expect(group.get_by_role("button", name="Show less")).to_be_visible()
    high = group.bounding_box()
    assert low
    assert high
    assert low["height"] < 700 < high["height"]


def test_only_the_curves_that_a_run_has_are_drawn(browse: Open, service: Service) -> None:
    ranks = [row | {"adalora/rank_mean": 8 - row["step"] / 40, "adalora/budget": 200} for row in recorded("healthy")]
    service.add_run("20260131-1-plain", recorded("healthy"), "succeeded")
    service.add_run("20260131-2-ranks", ranks, "succeeded")
    page = browse().open("#/runs/20260131-2-ranks")
    expect(page.get_by_role("img", name=re.compile("^Adapter ranks, 80 points"))).to_be_visible()
    page.goto(page.url.replace("2-ranks", "1-plain"))
    expect(page.get_by_role("img", name=re.compile("^KL divergence"))).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("^(Adapter ranks|Replaced groups|Critic)"))).to_have_count(0)


def test_runs_are_compared(browse: Open, runs: dict[str, str]) -> None:
    page = browse().open()
    page.get_by_label(re.compile("Compare good")).check()
    page.get_by_label(re.compile("Compare fast")).check()
    page.get_by_role("link", name="Compare", exact=True).click()
    expect(page.get_by_role("img", name=re.compile("^Reward, 80 points.*good.*fast"))).to_be_visible()
    expect(page.get_by_role("row", name=re.compile("train.learning_rate"))).to_contain_text("5e-4")


def test_only_what_a_run_allows_is_offered(browse: Open, service: Service, runs: dict[str, str]) -> None:
    """A run's actions show whether it can be paused."""
    service.allowed = ["stop", "clone"]
    page = browse().open(f"#/runs/{runs['going']}")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("button", name="Clone")).to_be_visible()
    expect(page.get_by_role("button", name="Pause")).to_have_count(0)
    expect(page.get_by_role("button", name="Delete")).to_have_count(0)
    expect(page.get_by_role("link", name="Chat")).to_have_count(0)


@pytest.mark.parametrize(
    ("state", "fields", "words"),
    [
        ("queued", {"queue": {"position": 2, "reason": "needs 2 GPUs"}}, "The run is waiting in the queue."),
        ("queued", {"queue": {"position": 0, "reason": "it is starting"}}, "Loading models"),
        ("paused", {}, "The run was paused before its first step."),
        ("running", {}, "Loading models"),
    ],
)
def test_why_there_are_no_curves_yet(
    browse: Open, service: Service, state: str, fields: dict[str, object], words: str
) -> None:
    service.add_run("20260131-1-new", [], state, **fields)
    expect(browse().open("#/runs/20260131-1-new").get_by_text(words)).to_be_visible()


def test_a_comparison_leaves_out_a_run_that_is_gone(browse: Open, runs: dict[str, str]) -> None:
    watched = browse()
    watched.expected = ["404"]
    page = watched.open(f"#/compare?ids={runs['good']},20260101-gone,{runs['fast']}")
    expect(page.get_by_text("20260101-gone no longer exists.")).to_be_visible()
    expect(page.get_by_role("heading", name="Compare 2 runs")).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("^Reward, 80 points.*good.*fast"))).to_be_visible()
