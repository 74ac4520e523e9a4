"""The page in a real Chromium: contrast, keyboard, narrow screens, long lists, large curves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.support.browser import Open
from tests.support.page_server import StandIn
from tests.support.page_state import Service, recorded

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

VIEWS = {
    "runs": "#/runs",
    "model": "#/new/model",
    "dataset": "#/new/data",
    "settings": "#/new/settings",
    "review": "#/new/review",
    "curves": "#/runs/20260131-1-good",
    "doctor": "#/runs/20260130-2-fast/doctor",
    "samples": "#/runs/20260131-1-good/samples",
    "logs": "#/runs/20260131-1-good/logs",
    "chat": "#/runs/20260131-1-good/chat",
    "failed": "#/runs/20260130-1-broken",
    "queued": "#/runs/20260131-3-waiting",
    "compare": "#/compare?ids=20260131-1-good,20260130-2-fast",
}


def probe(name: str) -> str:
    """A function for the browser; as a file of its own it ends with a semicolon, which an expression may not."""
    return (Path(__file__).parent / "probes" / name).read_text().rstrip().removesuffix(";")


CONTRAST, CONTROLS, FOCUSED = probe("contrast.js"), probe("controls.js"), probe("focused.js")


def settled(page: Page) -> None:
    """Nothing is loading any more, and what was loaded is drawn."""
    expect(page.locator("main h1").first).to_be_visible()
    expect(page.get_by_role("status", name="Loading")).to_have_count(0)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read(browse: Open, runs: dict[str, str], theme: str) -> None:
    watched = browse(theme=theme)
    found = {}
    for name, address in VIEWS.items():
        page = watched.open(address)
        settled(page)
        if bad := page.evaluate(CONTRAST):
            found[name] = bad
    assert found == {}


def test_the_contrast_test_sees_offences(browse: Open) -> None:
    page = browse().open()
    settled(page)
    page.evaluate("document.querySelector('h1').style.color = '#aaa'")
    (line,) = page.evaluate(CONTRAST)
    assert line.startswith("Runs")


@pytest.mark.parametrize("view", ["runs", "model", "settings", "curves", "samples", "doctor"])
def test_everything_is_reached_by_keyboard_and_seen_to_be(browse: Open, runs: dict[str, str], view: str) -> None:
    page = browse().open(VIEWS[view])
    settled(page)
    if view == "curves":
        expect(page.get_by_role("img", name=re.compile("^Throughput"))).to_be_visible()
    wanted = page.evaluate(CONTROLS)
    seen: dict[str, str] = {}
    for _ in range(3 * wanted + 10):
        page.keyboard.press("Tab")
        focused = page.evaluate(FOCUSED)
        if focused is None:
            if seen:
                break
            continue
        mark, outlined, what, visible = focused
        if mark in seen:
            break
        assert outlined, f"no focus to be seen: {what}"
        assert visible
        seen[mark] = what
    assert len(seen) >= wanted, f"{len(seen)} of {wanted}: {list(seen.values())}"


def test_the_four_steps_by_keyboard_alone(browse: Open) -> None:
    page = browse().open("#/new/model")
    settled(page)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.get_by_role("radio", name=re.compile("qwen3")).focus()
    page.keyboard.press("Space")
    expect(page.get_by_role("radio", name=re.compile("qwen3"))).to_be_checked()
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("radio", name=re.compile("llama-3.2"))).to_be_checked()
    page.get_by_role("link", name="Continue").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Drop a prompt file here")).to_be_visible()
    expect(page.locator("main")).to_be_focused()


@pytest.mark.parametrize("width", [360, 768, 1920])
def test_nothing_is_wider_than_the_screen(browse: Open, runs: dict[str, str], width: int) -> None:
    watched = browse(width=width, height=780)
    for name, address in VIEWS.items():
        page = watched.open(address)
        settled(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name


@pytest.mark.parametrize("width", [761, 780, 799])
def test_the_table_of_runs_is_not_cut_off(browse: Open, service: Service, runs: dict[str, str], width: int) -> None:
    """Where it is still a table: its card hides what is wider."""
    name = "a-very-long-name-that-somebody-gave-a-run-of-his-own-x64charsxx"
    service.add_run(f"20260131-4-{name}", recorded("healthy")[:10], "paused", name=name)
    failed = {"type": "TheVeryLongNameOfAnErrorThatSomebodyRaised", "message": "x" * 60}
    service.add_run("20260131-5-odd", [], "failed", error=failed)
    page = browse(width=width).open("#/runs")
    settled(page)
    expect(page.get_by_text(name).first).to_be_visible()
    table, card = page.locator("table.runs").bounding_box(), page.locator(".card").bounding_box()
    assert table
    assert card
    assert table["x"] + table["width"] <= card["x"] + card["width"]


@pytest.mark.parametrize("width", [320, 360])
def test_the_clusters_use_is_seen_on_a_phone_too(browse: Open, width: int) -> None:
    page = browse(width=width).open("#/runs")
    settled(page)
    expect(page.get_by_label("Cluster use")).to_be_visible()
    expect(page.get_by_label("Cluster use")).to_be_in_viewport(ratio=1)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_names_that_are_long_or_look_like_markup(browse: Open, service: Service) -> None:
    name = "<img src=x onerror=alert(1)>" + "x" * 300
    service.add_run("20260131-9-odd", recorded("healthy"), "succeeded", name=name)
    watched = browse(width=360)
    page = watched.open()
    expect(page.get_by_text(name)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page = watched.open("#/runs/20260131-9-odd")
    expect(page.get_by_role("heading", level=1)).to_have_text(name)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_thousand_runs(browse: Open, service: Service) -> None:
    row = recorded("healthy")[:1]
    for number in range(1000):
        service.add_run(f"20260131-{number:04d}-run", row, "succeeded")
    page = browse().open()
    expect(page.get_by_text("page 1 of 20, 1,000 runs")).to_be_visible()
    assert page.locator(".runs tbody tr").count() == 50
    page.get_by_role("button", name="Older").click()
    expect(page.get_by_role("link", name=re.compile("arithmetic")).first).to_have_attribute("href", re.compile("0949"))
    page.get_by_role("button", name="Newer").click()
    expect(page.get_by_text("page 1 of 20")).to_be_visible()


def test_a_hundred_thousand_points_are_thinned_quickly_and_keep_their_peaks(browse: Open) -> None:
    page = browse().open()
    settled(page)
    points, highest, last, ms = page.evaluate("""async () => {
      const { decimate } = await import("./js/chart.js");
      const x = Array.from({length: 100000}, (_, i) => i), y = x.map((i) => Math.sin(i / 1000));
      y[54321] = 9; y[500] = null;
      const start = performance.now(), [steps, values] = decimate([x, y]);
      return [steps.length, Math.max(...values), steps.at(-1), performance.now() - start];
    }""")
    assert points <= 3002
    assert (highest, last) == (9, 99999)
    assert ms < 1000  # some 10 on an idle machine; a guard against what grows with the square


def test_a_run_of_many_steps(browse: Open, service: Service) -> None:
    rows = [{"step": step, "reward/mean": step / 5000, "kl/mean": 0.1} for step in range(1, 5001)]
    service.add_run("20260131-8-long", rows, "succeeded")
    watched = browse()
    page = watched.open("#/runs/20260131-8-long")
    expect(
        page.get_by_role("img", name=re.compile(r"^Reward, \d+ points to step 5000\. trained on: last 1,"))
    ).to_be_visible()
    page = watched.open("#/runs/20260131-8-long/samples")
    page.get_by_label("Step", exact=True).fill("1234")
    page.keyboard.press("Enter")
    expect(page.get_by_text("24 completions of step 1,234")).to_be_visible()


def test_it_loads_in_under_a_second(browse: Open, server: StandIn) -> None:
    """From the request to the drawn view, the best of three: other work of the machine is not the page's."""
    page = browse().open()
    expect(page.get_by_role("heading", name="No runs yet")).to_be_visible()
    taken = []
    for _ in range(3):
        page.reload()
        expect(page.get_by_role("heading", name="No runs yet")).to_be_visible()
        taken.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
    assert min(taken) < 1000  # ms


def test_reduced_motion(browse: Open, runs: dict[str, str]) -> None:
    watched = browse()
    watched.page.emulate_media(reduced_motion="reduce")
    page = watched.open()
    settled(page)
    moving = "[...document.querySelectorAll('*')].some((e) => getComputedStyle(e, '::before').animationName !== 'none')"
    assert not page.evaluate(moving)


def test_the_theme_can_be_chosen_and_is_kept(browse: Open) -> None:
    page = browse().open()
    page.get_by_role("button", name="Switch to dark colors").click()
    page.reload()
    expect(page.get_by_role("button", name="Switch to light colors")).to_be_visible()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_an_unknown_address(browse: Open) -> None:
    watched = browse()
    watched.expected = ["404"]
    expect(watched.open("#/nowhere").get_by_role("heading", name="Page not found")).to_be_visible()
    expect(watched.open("#/runs/100%").get_by_role("heading", name="Run not found")).to_be_visible()
    expect(watched.open("#/runs/none").get_by_role("heading", name="Run not found")).to_be_visible()
