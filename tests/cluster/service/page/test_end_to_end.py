"""The whole way on the real stack: `rlhf serve`, Ray, vLLM and DeepSpeed beneath a page in a real Chromium.

Tiny models of random weights; what is checked is the way, not what they learn. In the middle of the run the service is
ended and started again: the run must not notice, and the page must find its way back. Then it is paused and resumed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.browser import Watched
from trainers.tiny_models import make_random_policy, make_random_reward_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

RLHF = str(Path(sys.executable).with_name("rlhf"))
START, TRAIN, CHAT = 120_000, 300_000, 180_000  # ms that these may take on two busy cores
STEPS = 40  # enough that it still goes when the service is back


@dataclass
class Serving:
    """A real service that can be ended and started again at the same address."""

    folder: Path
    port: int
    process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [RLHF, "serve", "--port", str(self.port), "--root", "runs", "--models", "models"]
        self.process = subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        assert self.url in self.process.stdout.readline()

    def end(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def end_ray(self) -> None:
        """The cluster that the service started outlives it; here it ends with the test."""
        started = json.loads((self.folder / "runs/.service/ray.json").read_text())
        with contextlib.suppress(psutil.NoSuchProcess):
            ray = psutil.Process(started["pid"])
            family = [ray, *ray.children(recursive=True)]
            ray.terminate()
            _, alive = psutil.wait_procs(family, timeout=60)
            for process in alive:
                process.kill()
        shutil.rmtree(started["temporary"], ignore_errors=True)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    make_random_policy(tmp_path / "models/policy")
    make_random_reward_model(tmp_path / "models/judge")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = Serving(tmp_path, port)
    one.start()
    yield one
    one.end()
    one.end_ray()


@pytest.fixture
def watched(chromium: Browser, serving: Serving) -> Iterator[Watched]:
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    one = Watched(context.new_page(), serving.url)
    one.expected = [
        "ERR_CONNECTION_REFUSED",
        "ERR_INCOMPLETE_CHUNKED_ENCODING",
        "ERR_EMPTY_RESPONSE",
        "ERR_CONNECTION_RESET",
    ]
    yield one
    context.close()
    one.check()


def configure(page: Page, prompts: Path) -> None:
    """From an empty list of runs to the review."""
    page.get_by_role("link", name="Start your first run").click()
    page.get_by_role("radio", name=re.compile("^policy")).check()
    page.get_by_role("radio", name=re.compile("^judge")).check()
    page.get_by_role("link", name="Continue").click()
    page.locator("input[type=file]").set_input_files(prompts)
    expect(page.get_by_role("heading", name="RLHF Online, 12 prompts, ready")).to_be_visible(timeout=START)
    page.get_by_role("link", name="Continue").click()
    fields = {"Steps": STEPS, "Prompts per step": 4, "Completions per prompt": 4, "Max completion length (tokens)": 8}
    for label, value in (fields | {"Max prompt length (tokens)": 64}).items():
        page.get_by_label(label, exact=True).fill(str(value))
    page.locator("summary").get_by_text("Model", exact=True).click()
    page.locator("#f-policy-dtype").select_option("float32")
    page.get_by_role("link", name="Review", exact=True).last.click()
    page.get_by_label("Run name").fill("whole-way")
    expect(page.get_by_text("4 prompts × 4 completions = 16 samples a step")).to_be_visible(timeout=START)


def test_from_an_upload_to_a_chat_with_the_result(watched: Watched, serving: Serving) -> None:
    prompts = serving.folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(12)))
    page = watched.open()
    configure(page, prompts)
    page.get_by_role("button", name="Start training").click(timeout=START)

    state = page.locator(".run-head .state")
    expect(page.get_by_text(re.compile(rf"^Step [1-9]\d* of {STEPS}$"))).to_be_visible(timeout=TRAIN)
    serving.end()
    expect(page.get_by_text("the server does not answer; trying again")).to_be_visible(timeout=START)
    serving.start()
    page.get_by_role("button", name="Pause").click(timeout=START)
    expect(state).to_have_text("paused", timeout=TRAIN)
    expect(page.get_by_role("complementary", name="About the run")).to_contain_text(re.compile(r"step \d+"))
    page.get_by_role("button", name="Resume").click()
    expect(state).to_have_text("succeeded", timeout=TRAIN)
    expect(page.get_by_role("img", name=re.compile(rf"^Reward, {STEPS} points to step {STEPS}"))).to_be_visible()

    of_the_run = page.get_by_role("navigation", name="Run views")
    of_the_run.get_by_role("link", name="Samples").click()
    expect(page.get_by_text(f"16 completions of step {STEPS}")).to_be_visible(timeout=START)
    page.get_by_role("article").first.get_by_role("button", name="Tokens").click()
    expect(page.get_by_label(re.compile("^Tokens, tinted by")).locator("span").first).to_be_visible(timeout=START)
    of_the_run.get_by_role("link", name="Logs").click()
    expect(page.get_by_label("Log driver.log")).to_contain_text(f"step {STEPS}/{STEPS}", timeout=START)

    with page.expect_download(timeout=START) as download:
        page.get_by_role("button", name=re.compile("^Download")).click()
    assert download.value.suggested_filename.endswith(".tar")
    assert os.path.getsize(download.value.path()) > 100_000

    of_the_run.get_by_role("link", name="Chat").click()
    page.get_by_label("Message").fill("3+4=")
    page.get_by_role("button", name="Send").click()
    for side in ("Trained", "Base (policy)"):
        answer = page.get_by_role("region", name=side).locator(".turn.assistant")
        expect(answer).to_be_visible(timeout=CHAT)
    expect(page.get_by_role("button", name="Stop")).to_have_count(0, timeout=CHAT)
    expect(page.get_by_role("alert")).to_have_count(0)
