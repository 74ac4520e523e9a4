"""The dataset step in a real Chromium: uploads, verdicts, and the ways out of a file that is not ready."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.support.browser import Open
from tests.support.page_forms import LARGE, PROMPTS, drafted, file, upload
from tests.support.page_state import Service

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


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


def test_invalid_lines_can_be_skipped(browse: Open, tmp_path: Path) -> None:
    page = browse().open("#/new/data")
    upload(page, file(tmp_path, "some.jsonl", PROMPTS + 'not json\n{"prompt": ""}\n{"prompt": 5}\n'))
    expect(page.get_by_role("heading", name=re.compile("RLHF Online, .*, not ready"))).to_be_visible()
    expect(page.get_by_text("or train without 3 invalid lines")).to_be_visible()
    page.get_by_role("button", name="Skip invalid lines").click()
    expect(page.get_by_role("heading", name=re.compile("RLHF Online, .*, ready"))).to_be_visible()
    expect(page.get_by_text("3 invalid lines are skipped")).to_be_visible()
    drafted(page, "data", {"prompts": str(tmp_path / "ds-1.jsonl"), "skip_invalid": True})
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_role("heading", name=re.compile("RLHF Online, .*, not ready"))).to_be_visible()


def test_a_dataset_is_deleted_only_when_confirmed_and_unused(browse: Open, service: Service, tmp_path: Path) -> None:
    watched = browse()
    watched.expected = ["409"]
    page = watched.open("#/new/data")
    upload(page, file(tmp_path, "prompts.jsonl", PROMPTS))
    service.used = {"ds-1"}
    page.get_by_role("button", name="Delete").click()
    dialog = page.get_by_role("dialog", name="Delete prompts.jsonl?")
    dialog.get_by_role("button", name="Delete").click()
    expect(dialog.get_by_role("alert")).to_contain_text("the run going reads this dataset")
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("heading", name="RLHF Online, 30 prompts, ready")).to_be_visible()
    service.used = set()
    page.get_by_role("button", name="Delete").click()
    dialog.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("heading", name="RLHF Online, 30 prompts, ready")).to_have_count(0)
    assert service.datasets == {}


def test_an_upload_continues_while_another_view_is_open(browse: Open, service: Service, tmp_path: Path) -> None:
    service.taking.clear()
    service.reading.clear()
    page = browse().open("#/new/data")
    upload(page, file(tmp_path, "large.jsonl", LARGE))
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
    expect(page.get_by_role("heading", name="RLHF Online, 600 prompts, ready")).to_be_visible()


@pytest.mark.parametrize("when", ["Uploading", "Reading"])
def test_an_upload_that_is_stopped_leaves_nothing(browse: Open, service: Service, tmp_path: Path, when: str) -> None:
    """Also if the server already has the complete file and would make a dataset of it."""
    (service.taking if when == "Uploading" else service.reading).clear()
    page = browse().open("#/new/data")
    upload(page, file(tmp_path, "large.jsonl", LARGE))
    expect(page.get_by_text(f"{when} large.jsonl")).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    if when == "Reading":
        expect(page.get_by_text("Stopping large.jsonl")).to_be_visible()
        service.reading.set()
    expect(page.get_by_role("heading", name="Drop a prompt file here")).to_be_visible()
    expect(page.get_by_text("large.jsonl")).to_have_count(0)
    service.taking.set()
    assert service.datasets == {}


def test_responses_can_be_left_out(browse: Open, tmp_path: Path) -> None:
    page = browse().open("#/new/data")
    upload(page, file(tmp_path, "sft.jsonl", '{"prompt": "a", "response": "b"}\n'))
    expect(page.get_by_role("heading", name="Prompts with responses (SFT), 1 prompt, not ready")).to_be_visible()
    page.get_by_role("button", name="Use the prompts only").click()
    expect(page.get_by_role("heading", name="Prompts with responses (SFT), 1 prompt, ready")).to_be_visible()
