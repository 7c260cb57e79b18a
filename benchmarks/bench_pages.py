"""How long people wait: the server's answers about live prompts, and the report in a browser.

    python -m benchmarks.bench_pages server configs/quickstart.yaml --store artifacts
    python -m benchmarks.bench_pages report artifacts/report/<digest>/report.html --features 1000

The server is the real one, a process of its own, asked over HTTP. A first answer is what the page
asks when somebody enters a text: predictions of both models after every token, then the features of
the last one with their effects. Then the strongest feature is taken out, exactly, on both models.
All is asked about short prompts, and about one as long as the server takes. The report is opened in
headless Chromium from the file system, if asked with its feature cards repeated up to a number.
Results: docs/results.md.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import typer
from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.table import Table

from benchmarks.pages import QUIET, chromium, serving
from benchmarks.timing import seconds
from rldecoder.dashboard.report import script_json
from rldecoder.provenance import device_name

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

LONG_TEXT = (
    "The old harbour lies north of the town, where the river meets the sea. Until the railway came,"
    " everything that the valley sold left from here: wool, timber, slate, and in good years grain."
    " Forty ships could lie at the quay, and the masters of the larger ones kept houses on the hill"
    " above it, with windows towards the water. In the winter of 1862 a storm broke the outer wall."
    " It was never rebuilt in stone; the council paid for piles and planks, which had to be renewed"
    " every ten years. When the line to the coast was opened, half of the trade went by rail within"
    " two summers, and the rest followed slowly. The last sailing ship was sold in 1911. Since then"
    " the harbour has belonged to anglers, to a club of rowers, and to painters who like the light."
    " Last spring a group of students measured the depth of the basin. They found four metres where"
    " the charts of 1870 show nine, and counted the layers of mud to learn how fast it had filled. "
    "Their report asks whether it should be dredged at all, because two rare plants now grow there."
    " The town will decide in autumn. Both sides have hired experts, and both experts have written "
    "that more must be known before anybody digs. Meanwhile the rowers go out every morning at six,"
    " past the broken wall and the buoy, and turn where the current becomes too strong for boats."
)
"""Cut at a word so that it just fits; longer than 256 tokens of any model that is supported."""
SCRIPT = re.compile(r'(<script type="application/json" id="feature-data">)(.*?)(</script>)', re.S)


class Client:
    """The page's side of the conversation."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=600, trust_env=False)
        page = self._http.get("/").raise_for_status().text
        token = _found(r'name="rldecoder-token" content="([^"]+)"', page)
        self._headers = {"x-rldecoder-token": token, "origin": url.rstrip("/")}
        self.dtype = _found(r'id="model-dtype">([^<]+)<', page)
        self.max_tokens = int(_found(r"at most (\d+) tokens", page))

    def longest(self, text: str) -> str:
        """As many words of a text as the server takes."""
        words = text.split(" ")
        while words:
            answer = self._post("trace", prompt=" ".join(words))
            if answer.status_code == httpx.codes.OK:
                return " ".join(words)
            words.pop()
        raise SystemExit("The server takes no prompt.")

    def ask(self, path: str, **body: Any) -> Any:
        """One question."""
        return self._post(path, **body).raise_for_status().json()

    def _post(self, path: str, **body: Any) -> httpx.Response:
        return self._http.post(f"/api/{path}", json=body, headers=self._headers)


def _found(pattern: str, page: str) -> str:
    """The pattern's group on the server's page."""
    found = re.search(pattern, page)
    assert found is not None, pattern
    return found[1]


@app.command()
def server(
    config: Path,
    store: Path = Path("artifacts"),
    rounds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Times of a first answer and of an ablation, each prompt `rounds` times."""
    with serving(config, store) as address:
        client = Client(address)
        # The short prompts go between its rounds: the server keeps the last few prompts' residuals.
        long = client.longest(LONG_TEXT)
        times: dict[tuple[str, bool], list[float]] = {}
        lengths: dict[bool, list[int]] = {False: [], True: []}
        for _ in range(rounds):
            for prompt in (*PROMPTS, long):
                length, taken = _one_prompt(client, prompt)
                lengths[prompt == long].append(length)
                for name, one in taken.items():
                    times.setdefault((name, prompt == long), []).append(one)

    console.print(f"{_machine()}; frozen model in {client.dtype}; limit {client.max_tokens} tokens")
    table = Table("question", "tokens", "median, s", "worst, s", "answers")
    for (name, is_long), all_taken in sorted(times.items(), key=lambda item: item[0][1]):
        shortest, longest = min(lengths[is_long]), max(lengths[is_long])
        tokens = str(longest) if shortest == longest else f"{shortest} to {longest}"
        middle = statistics.median(all_taken)
        row = (f"{middle:.2f}", f"{max(all_taken):.2f}", str(len(all_taken)))
        table.add_row(name, tokens, *row)
    console.print(table)


def _machine() -> str:
    return f"{device_name(torch.device('cpu'))}, {len(os.sched_getaffinity(0))} cores"


def taken_out(latent: int) -> dict[str, Any]:
    """The change, as the page asks for it."""
    return {"latent": latent, "how": "scale", "value": 0}


def _one_prompt(client: Client, prompt: str) -> tuple[int, dict[str, float]]:
    """Tokens of the prompt, and seconds by question."""
    seen: dict[str, Any] = {}

    def first_answer() -> None:
        seen["last"] = len(client.ask("trace", prompt=prompt)["tokens"]) - 1
        found = client.ask("position", prompt=prompt, position=seen["last"])
        seen["latent"] = found["features"][0]["latent"]

    def place(**more: Any) -> dict[str, Any]:
        return {"prompt": prompt, "position": seen["last"], **more}

    times = {
        "first answer": seconds(first_answer),
        "take a feature out": seconds(
            lambda: client.ask("intervene", **place(changes=[taken_out(seen["latent"])]))
        ),
        "explanation, claims tested": seconds(lambda: client.ask("explain", **place())),
    }
    return seen["last"] + 1, times


@app.command()
def report(
    page: Path,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    features: Annotated[
        int, typer.Option(min=0, help="Repeat the feature cards up to this number; 0: as it is.")
    ] = 0,
) -> None:
    """Size of a report and the time until Chromium has loaded it."""
    with tempfile.TemporaryDirectory() as folder:
        if features:
            html = with_features(page.read_text(encoding="utf-8"), features)
            page = Path(folder) / "report.html"
            page.write_text(html, encoding="utf-8")
        loads = _load_times(page, rounds)
        text = page.read_text(encoding="utf-8")
    found = SCRIPT.search(text)
    assert found is not None
    console.print(
        f"{_machine()}: {len(json.loads(found[2])):,} features, "
        f"{len(text.encode()) / 1e6:.1f} MB; loaded in {statistics.median(loads):.2f} s (median of "
        f"{rounds}; first {loads[0]:.2f}, worst {max(loads):.2f})"
    )


def with_features(html: str, count: int) -> str:
    """The page with its feature cards repeated in turn up to a number, each a latent of its own."""
    found = SCRIPT.search(html)
    if found is None or not (cards := json.loads(found[2])):
        raise SystemExit("The page has no feature cards to repeat.")
    more = [
        {**cards[place % len(cards)], "latent": place, "rank": place + 1, "queue": place + 1}
        for place in range(count)
    ]
    # Pasted, not substituted: a replacement text's backslashes would be read as escapes.
    return html[: found.start(2)] + script_json(more) + html[found.end(2) :]


def _load_times(page: Path, rounds: int) -> list[float]:
    """Seconds from the start of the navigation to the end of the load event."""
    took = "performance.getEntriesByType('navigation')[0].loadEventEnd"
    loads = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=QUIET)
        for _ in range(rounds):
            tab = browser.new_page()
            tab.goto(page.resolve().as_uri(), wait_until="load")
            tab.wait_for_function(f"{took} > 0")
            loads.append(float(tab.evaluate(took)) / 1000)
            tab.close()
        browser.close()
    return loads


if __name__ == "__main__":
    app()
