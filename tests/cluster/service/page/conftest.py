"""A real headless Chromium in front of the page, which the stand-in serves. Whatever the page asks of another server,
breaks of the content-security policy, or writes to the console as an error, fails the test."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from tests.support.browser import WAIT, Open, Watched
from tests.support.page_server import StandIn
from tests.support.page_state import Service, config_tree, recorded

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """For a module and no longer: while it lives, its event loop holds the main thread, and no async test can run."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install chromium to test the page")
    with sync_playwright() as runner:
        expect.set_options(timeout=WAIT)
        browser = runner.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


@pytest.fixture
def server(service: Service) -> Iterator[StandIn]:
    with StandIn(service) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield running
        running.tick.set()
        running.shutdown()
        thread.join(10)


@pytest.fixture
def browse(chromium: Browser, server: StandIn) -> Iterator[Open]:
    """Opens watched pages: `browse(width=360, theme="dark")`."""
    watched: list[Watched] = []

    def make(*, width: int = 1280, height: int = 900, theme: str = "light") -> Watched:
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
        watched.append(Watched(context.new_page(), server.url))
        return watched[-1]

    yield make
    for one in watched:
        one.page.context.close()
    for one in watched:
        one.check()


@pytest.fixture
def runs(service: Service) -> dict[str, str]:
    """Runs in every state, by name: their ids."""
    broken = {"role": "generator", "rank": 0, "phase": "start", "type": "OutOfMemoryError"}
    broken |= {"message": "CUDA out of memory: tried to allocate 2.1 GiB", "log": "logs/learner-0.log"}
    fast = config_tree(name="fast", train={"steps": 100, "learning_rate": 5e-4})
    waiting = {"position": 1, "reason": "needs 2 GPUs, 1 of 4 is free"}
    service.add_run("20260130-1-broken", [], "failed", config=config_tree(name="broken"), error=broken)
    service.add_run("20260130-2-fast", recorded("rate_too_high"), "stopped", config=fast)
    service.add_run("20260131-1-good", recorded("healthy"), "succeeded", config=config_tree(name="good"))
    service.add_run("20260131-2-going", recorded("healthy")[:34], "running", config=config_tree(name="going"))
    service.add_run("20260131-3-waiting", [], "queued", config=config_tree(name="waiting"), queue=waiting)
    return {run["run"]["name"]: run_id for run_id, run in service.runs.items()}
