"""Chromium: a page of another port gets nothing done, and the link logs a person in."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import expect
from prefect import flow, task

from flows.serve_ui import login
from tests.browser import Watched, open_browser
from tests.flows.ui_client import Ui

pytestmark = [pytest.mark.browser, pytest.mark.slow]

EVIL = """async ([origin, path, body]) => {
  const url = origin + path, json = {"content-type": "application/json"}, out = {};
  const attempt = async (name, ask) => {
    try { const a = await ask(); out[name] = a.type === "opaque" ? "opaque" : a.status; }
    catch (error) { out[name] = "refused"; }
  };
  const post = more => fetch(url, {method: "POST", body, ...more});
  await attempt("cors", () => post({headers: json}));
  await attempt("credentials", () => post({headers: json, credentials: "include"}));
  await attempt("guess", () => post({headers: {...json, authorization: "Basic Og=="}}));
  await attempt("text", () => post({headers: {"content-type": "text/plain"}}));
  await attempt("no-cors", () => post({mode: "no-cors", headers: {"content-type": "text/plain"}}));
  await attempt("read", () => fetch(origin + "/api/health"));
  await attempt("settings", () => fetch(origin + "/ui-settings"));
  await attempt("login", () => fetch(origin + "/rldecoder/login", {method: "POST", body: "{}"}));
  out.beacon = navigator.sendBeacon(url, new Blob([body], {type: "text/plain"}));
  out.websocket = await new Promise(done => {
    const socket = new WebSocket(origin.replace("http", "ws") + "/api/events/in", ["prefect"]);
    socket.onopen = () => done("open");
    socket.onerror = () => done("refused");
  });
  const frame = document.createElement("iframe");
  frame.name = "frame";
  document.body.append(frame);
  const form = document.createElement("form");
  Object.assign(form, {method: "POST", action: url, enctype: "text/plain", target: "frame"});
  form.append(Object.assign(document.createElement("input"), {name: body, value: ""}));
  document.body.append(form);
  form.submit();
  return out;
}"""


@pytest.fixture
def other_port() -> Iterator[str]:
    """A page of another origin, on this machine too: to cookies it would be the same site."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>evil</title><body>evil")

        def log_message(self, format: str, *arguments: Any) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@task
def drawn_task() -> int:
    """One bar of the graph."""
    return 1


@flow
def drawn_flow() -> int:
    """A run whose page has a graph."""
    return drawn_task()


def shows_its_graph(ui: Ui, browser: Watched) -> None:
    """PixiJS draws under the policy of the pages, which lets no other script in."""
    page = browser.page
    (run,) = ui.flow_runs(flows={"name": {"any_": ["drawn-flow"]}})
    browser.trouble.clear()
    page.goto(f"{ui.origin}/runs/flow-run/{run['id']}")
    expect(page.locator("canvas")).to_be_visible()
    # Prefect's page asks for its maker's statistics: that stays shut.
    trouble = [said for said in browser.trouble if "amplitude.com" not in said]
    assert [t for t in trouble if "Security Policy" in t or t.startswith("uncaught")] == []

    blocked = page.evaluate("""() => new Promise(done => {
      document.addEventListener("securitypolicyviolation", event => {
        if (event.blockedURI === "inline") done(event.effectiveDirective);
      });
      const script = document.createElement("script");
      script.textContent = "window.inline = true";
      document.body.append(script);
      if (window.inline) done("it ran");
    })""")
    assert blocked == "script-src-elem"


def test_the_link_lets_a_person_in_and_no_other_page(ui: Ui, other_port: str) -> None:
    deployment = ui.deployment("pipeline/pipeline-debug")["id"]
    path = f"/api/deployments/{deployment}/create_flow_run"
    body = json.dumps({"job_variables": {"command": "touch /tmp/rldecoder-evil"}})
    with ui.prefect_settings():
        drawn_flow()
    (link,) = (word for word in login(ui.home).split() if word.startswith("http"))
    assert link.startswith(ui.origin)
    with open_browser() as browser:
        page = browser.page
        # Without the link: Prefect asks for the password, and shows nothing.
        page.goto(f"{ui.origin}/")
        page.wait_for_url("**/login**")
        # With it: the dashboard, then the list of deployments.
        page.goto(link)
        page.wait_for_url("**/dashboard**")
        page.get_by_role("link", name="Deployments").click()
        expect(page.get_by_text("pipeline-debug", exact=True)).to_be_visible()
        expect(page.get_by_text("nightly", exact=True).first).to_be_visible()
        # Its pages ask nobody else, and the link is used up.
        asked = {url for url in browser.requests if url.startswith(("http:", "https:", "ws"))}
        answered = {url for url in asked if not url.startswith(ui.origin)}
        outside = [
            entry for entry in page.evaluate("performance.getEntriesByType('resource')")
            if entry["name"] in answered and entry.get("responseStatus")
        ]  # fmt: skip
        assert outside == []
        assert all("secret" not in url for url in asked)
        shows_its_graph(ui, browser)

        # The same browser, logged in: another port's page gets nothing.
        runs = len(ui.flow_runs())
        page.goto(other_port)
        seen = page.evaluate(EVIL, [ui.origin, path, body])
        page.wait_for_timeout(1000)
        assert seen.pop("beacon") is True  # sent blindly; it must not count
        assert seen.pop("no-cors") in ("opaque", "refused")  # its answer cannot be read
        assert set(seen.values()) == {"refused"}
        assert len(ui.flow_runs()) == runs
        # Nor does it show the pages in a frame, to steal clicks.
        page.evaluate("u => { document.querySelector('iframe').src = u }", f"{ui.origin}/")
        page.wait_for_timeout(500)
        assert not [f for f in page.frames if f.url.startswith(ui.origin) and f.title()]

        again = browser.page.context.new_page()
        again.goto(link)
        expect(again.get_by_text("This link lets nobody in")).to_be_visible()
