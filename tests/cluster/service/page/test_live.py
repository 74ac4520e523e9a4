"""A run's page while the run trains: events, polling without them, tries again, and when these must end."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import Page, expect

from tests.support.browser import Open
from tests.support.page_server import StandIn
from tests.support.page_state import Service, recorded

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

API = "**/api/**"


def refuse(page: Page, status: int, message: str) -> None:
    """Every request is refused from now on."""
    body = json.dumps({"error": {"code": "refused", "message": message, "details": []}})
    page.route(API, lambda route: route.fulfill(status=status, content_type="application/json", body=body))


def test_a_server_that_goes_and_comes_back(
    browse: Open, server: StandIn, service: Service, runs: dict[str, str]
) -> None:
    """The events break off and requests fail; the page reports it, and continues when they succeed again."""
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


def test_a_server_that_fails_for_a_while(browse: Open, server: StandIn, service: Service, runs: dict[str, str]) -> None:
    """A status of 500 or above is tried again, however often it comes."""
    watched = browse()
    watched.expected = ["503"]
    page = watched.open(f"#/runs/{runs['going']}")
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    refuse(page, 503, "the reader is busy")
    server.tick.set()  # ends the stream
    expect(page.get_by_text("the server does not answer; trying again")).to_be_visible()
    service.runs[runs["going"]]["run"]["state"] = "paused"
    page.unroute(API)
    expect(page.locator(".run-head .state")).to_have_text("paused")


def test_a_run_that_is_deleted_ends_the_tries(
    browse: Open, server: StandIn, service: Service, runs: dict[str, str]
) -> None:
    watched = browse()
    watched.expected = ["404"]
    page = watched.open(f"#/runs/{runs['going']}")
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    del service.runs[runs["going"]]
    server.tick.set()
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("This run no longer exists")
    expect(page.locator(".run-head .live")).to_have_text("not updating")
    alert.get_by_role("link", name="All runs").click()
    expect(page.get_by_role("heading", name="Runs")).to_be_visible()


def test_a_refusal_is_shown_and_can_be_tried_again(browse: Open, server: StandIn, runs: dict[str, str]) -> None:
    watched = browse()
    watched.expected = ["403"]
    page = watched.open(f"#/runs/{runs['going']}")
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    refuse(page, 403, "not from this address")
    server.tick.set()
    expect(page.get_by_role("alert")).to_contain_text("not from this address")
    expect(page.locator(".run-head .live")).to_have_text("not updating")
    page.unroute(API)
    server.tick.clear()
    page.get_by_role("alert").get_by_role("link", name="Try again").click()
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_an_expired_token_leads_to_the_sign_in(
    browse: Open, server: StandIn, service: Service, runs: dict[str, str]
) -> None:
    service.token = "correct horse battery"
    watched = browse()
    watched.expected = ["401"]
    page = watched.open(f"#/runs/{runs['going']}")
    page.get_by_label("Token").fill(service.token)
    page.keyboard.press("Enter")
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    service.token = "another"
    server.tick.set()
    expect(page.get_by_role("heading", name="Sign in with a token")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_text("The token is invalid or has expired.")
    server.tick.clear()
    page.get_by_label("Token").fill("another")
    page.keyboard.press("Enter")
    expect(page.get_by_text("live", exact=True)).to_be_visible()


def test_which_refusals_are_final(browse: Open) -> None:
    """HTTP's statuses of the client's mistakes, less those that pass: timeout, too early, too many requests."""
    page = browse().open()
    final = page.evaluate("""async () => {
      const [{ isFinal }, { ApiError }] = await Promise.all([import("./js/live.js"), import("./js/api.js")]);
      const statuses = [0, 400, 401, 403, 404, 408, 409, 410, 422, 425, 429, 500, 502, 503];
      return statuses.filter((status) => isFinal(new ApiError(status, "", "")));
    }""")
    assert final == [400, 401, 403, 404, 409, 410, 422]
