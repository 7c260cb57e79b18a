"""How long people wait: the server's answers about live prompts, and the report in a browser.

    python -m benchmarks.bench_pages server configs/quickstart.yaml --store artifacts
    python -m benchmarks.bench_pages report artifacts/report/<digest>/report.html

The server is the real one, a process of its own, asked over HTTP. A first answer is what the page
asks when somebody enters a text: predictions of both models after every token, then the features of
the last one with their effects. Then the strongest feature is taken out, exactly, on both models.
The report is opened in headless Chromium from the file system. Results: docs/results.md.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.table import Table

from benchmarks.timing import seconds

app = typer.Typer(help=__doc__)
console = Console(width=110)

PROMPTS = (
    "The capital of France is",
    "Water boils when its temperature reaches",
    "def mean(values):\n    return sum(values) /",
    "In the year 1969 two astronauts walked on",
    "A list can be sorted in place with its method",
    "She opened the letter, read it twice, and put it back on the table without a word. Then",
    "The import statement finds a module, loads it if need be, and binds its name in",
    "Photosynthesis turns carbon dioxide and water into sugar, and the energy for that comes from",
    "My brother bought three apples, two pears and a melon. He ate one apple on the way home, so"
    " when he arrived there were two apples, two pears and a",
    "The committee met on Monday to discuss the budget of the coming year. Several members asked"
    " why the repair of the bridge had cost twice as much as planned, and the engineer said that",
)
"""5 to 40 tokens each, none of them from the text that models are measured on."""


class Client:
    """The page's side of the conversation."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=600, trust_env=False)
        page = self._http.get("/").raise_for_status().text
        found = re.search(r'name="rldecoder-token" content="([^"]+)"', page)
        assert found is not None
        self._headers = {"x-rldecoder-token": found[1], "origin": url.rstrip("/")}

    def ask(self, path: str, **body: Any) -> Any:
        """One question."""
        answer = self._http.post(f"/api/{path}", json=body, headers=self._headers)
        return answer.raise_for_status().json()


@app.command()
def server(
    config: Path,
    store: Path = Path("artifacts"),
    rounds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Times of a first answer and of an ablation, each prompt `rounds` times."""
    command = [sys.executable, "-m", "rldecoder.cli", "serve", str(config), "--store", str(store)]
    process = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        client = Client(_address(process))
        times: dict[str, list[float]] = {}
        for _ in range(rounds):
            for prompt in PROMPTS:
                for name, taken in _one_prompt(client, prompt).items():
                    times.setdefault(name, []).append(taken)
    finally:
        process.terminate()
        process.wait()
    table = Table("question", "median, s", "worst, s", "answers")
    for name, all_taken in times.items():
        middle = statistics.median(all_taken)
        row = (f"{middle:.2f}", f"{max(all_taken):.2f}", str(len(all_taken)))
        table.add_row(name, *row)
    console.print(table)


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if found := re.search(r"http://127\.0\.0\.1:\d+/", said.replace("\n", "")):
            return found[0]
    raise SystemExit(f"The server did not start:\n{said}")


def _one_prompt(client: Client, prompt: str) -> dict[str, float]:
    seen: dict[str, Any] = {}

    def first_answer() -> None:
        seen["last"] = len(client.ask("trace", prompt=prompt)["tokens"]) - 1
        found = client.ask("position", prompt=prompt, position=seen["last"])
        seen["latent"] = found["features"][0]["latent"]

    def place(**more: Any) -> dict[str, Any]:
        return {"prompt": prompt, "position": seen["last"], **more}

    return {
        "first answer": seconds(first_answer),
        "take a feature out": seconds(
            lambda: client.ask("intervene", **place(latent=seen["latent"], factor=0))
        ),
        "explanation, claims tested": seconds(lambda: client.ask("explain", **place())),
    }


@app.command()
def report(page: Path, rounds: Annotated[int, typer.Option(min=1)] = 5) -> None:
    """Size of a report and the time until Chromium has loaded it."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("No Chromium was found. Install it (Debian: apt-get install chromium).")
    took = "performance.getEntriesByType('navigation')[0].loadEventEnd"
    loads = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(rounds):
            tab = browser.new_page()
            tab.goto(page.resolve().as_uri(), wait_until="load")
            tab.wait_for_function(f"{took} > 0")
            loads.append(tab.evaluate(took) / 1000)
            tab.close()
        browser.close()
    size = page.stat().st_size / 2**20
    console.print(
        f"{size:.1f} MiB; loaded in {statistics.median(loads):.2f} s (median of {rounds}; "
        f"first {loads[0]:.2f}, worst {max(loads):.2f})"
    )


if __name__ == "__main__":
    app()
