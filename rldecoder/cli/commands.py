"""The commands. Settings belong in YAML; commands only say what to do with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.exceptions import TyperException

from rldecoder.errors import BadInputError
from rldecoder.terminal import Terminal

if TYPE_CHECKING:
    from rldecoder.run import Run

TYPER_INTERRUPTED = 130
"""What typer makes of a KeyboardInterrupt."""

app = typer.Typer(
    help="Read a frozen language model's middle layers: sparse autoencoder, feature decoder, "
    "PPO, checked explanations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
judge = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(judge, name="judge", help="People compare explanations: blind pairs out, files in.")
console = Terminal()

ConfigPath = Annotated[Path, typer.Argument(help="A run's YAML, such as configs/quickstart.yaml.")]
StoreOption = Annotated[
    Path | None, typer.Option("--store", help="Artifact store; default: the config's `store`.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one setting: --set train_sae.k=32 (repeatable)."),
]


@app.command()
def run(
    config: ConfigPath,
    store: StoreOption = None,
    until: Annotated[
        str | None, typer.Option(help="Stop after this stage (see `rldecoder status`).")
    ] = None,
    overrides: SetOption = None,
    prefect: Annotated[
        bool, typer.Option("--prefect/--no-prefect", help="Run as a Prefect flow, or plainly.")
    ] = True,
) -> None:
    """Run the pipeline: finished stages are reused, an interrupted one goes on."""
    opened = _open(config, store, overrides)
    from rldecoder.cli.run import run_and_summarise

    run_and_summarise(opened, until=until, prefect=prefect)


@app.command()
def status(config: ConfigPath, store: StoreOption = None, overrides: SetOption = None) -> None:
    """Show each stage's artifact: published, failed gate, interrupted or missing."""
    opened = _open(config, store, overrides)
    from rldecoder.cli.show import show_status

    show_status(opened, console)


@app.command()
def explain(
    config: ConfigPath,
    prompt: Annotated[str, typer.Argument(help="The text whose next token is explained.")],
    store: StoreOption = None,
    overrides: SetOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a self-contained page to this file.")
    ] = None,
) -> None:
    """Explain the next-token prediction for a prompt, in claims tested by intervention."""
    opened = _open(config, store, overrides)
    from rldecoder.cli.show import show_explanation

    show_explanation(opened, prompt, console, as_json=as_json, html=html)


@app.command(
    help="Serve a finished run on this machine: live prompts, exact ablations, label review."
    "\n\n"
    "Type a prompt and see both models' predictions token by token. Open a token's features, take "
    "one out or amplify it, and see the predictions change: both models are run again. The claims "
    "of an explanation are predictions; each is then tested in the same way. Search features; "
    "review labels by keyboard. Works offline; Ctrl-C stops it."
    "\n\n"
    "Example: rldecoder serve configs/quickstart.yaml --port 8760"
)
def serve(
    config: ConfigPath,
    store: StoreOption = None,
    overrides: SetOption = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="TCP port; 0 takes any that is free.")
    ] = 8760,
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Longest prompt; work and memory grow with it.")
    ] = 256,
    reviews: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file for verdicts on labels; default: `label_features.reviews`, or "
            "reviews.jsonl in the store."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback need --allow-remote.")
    ] = "127.0.0.1",
    allow_remote: Annotated[
        bool,
        typer.Option("--allow-remote", help="Let other machines in. There is no login."),
    ] = False,
    host_names: Annotated[
        list[str] | None,
        typer.Option(
            "--host-name",
            help="With --allow-remote: a name in browsers' address bars (repeatable).",
        ),
    ] = None,
) -> None:
    """Serve a finished run on this machine: live prompts, exact ablations, label review."""
    opened = _open(config, store, overrides)
    from rldecoder.cli.serve import serve_run

    serve_run(
        opened, console,
        host=host, port=port, allow_remote=allow_remote, host_names=host_names or [],
        max_tokens=max_tokens, reviews=reviews,
    )  # fmt: skip


@app.command()
def report(config: ConfigPath, store: StoreOption = None, overrides: SetOption = None) -> None:
    """Build (or reuse) the report of a finished run and print its path and targets."""
    opened = _open(config, store, overrides)
    from rldecoder.cli.run import rebuild_report

    rebuild_report(opened)


@app.command()
def estimate_labels(
    config: ConfigPath, store: StoreOption = None, overrides: SetOption = None
) -> None:
    """Say what labels by a language model would send and cost; nothing is sent."""
    opened = _open(config, store, overrides)
    from rldecoder.cli.estimate import show_estimate

    show_estimate(opened, console)


@app.command()
def export(
    config: ConfigPath,
    tool: Annotated[str, typer.Argument(help="Who reads it: neuronpedia, saedashboard or delphi.")],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    store: StoreOption = None,
    overrides: SetOption = None,
    model_id: Annotated[
        str | None, typer.Option(help="The model's name there; default: its name here.")
    ] = None,
    source_set: Annotated[str, typer.Option(help="The SAE's name there.")] = "rl-decoder",
    author: Annotated[str, typer.Option(help="Your name (Neuronpedia).")] = "RL-Decoder",
    author_id: Annotated[
        str | None,
        typer.Option(help="The site's id of the account that imports (Neuronpedia asks for it)."),
    ] = None,
) -> None:
    """Write labelled features for Neuronpedia or SAEDashboard, or activations for delphi."""
    from rldecoder.cli.export import Names, Tool, export_features

    if tool not in list(Tool):
        raise BadInputError(
            f"Nothing is known of the tool {tool!r}.",
            f"Features can be written for {', '.join(Tool)}.",
            "Example: rldecoder export configs/quickstart.yaml saedashboard features/",
        )
    opened = _open(config, store, overrides)
    names = Names(model_id, source_set, author, author_id)
    export_features(opened, Tool(tool), out, names, console)


@judge.command(name="export")
def judge_export(
    config: ConfigPath,
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    store: StoreOption = None,
    overrides: SetOption = None,
    pairs: Annotated[int, typer.Option(min=1, help="How many predictions to explain.")] = 40,
    seed: Annotated[int, typer.Option(help="Decides the prompts and both orders.")] = 0,
) -> None:
    """Write pairs of explanations (Method A, Method B) that do not say which is which."""
    opened = _open(config, store, overrides)
    from rldecoder.cli.judge import export_pairs

    export_pairs(opened, out, console, count=pairs, seed=seed)


@judge.command(name="score")
def judge_score(
    key: Annotated[Path, typer.Argument(help="The key.json of the export.")],
    files: Annotated[list[Path], typer.Argument(help="Filled-in files, one a judge.")],
    result: Annotated[Path, typer.Option(help="Where the numbers go.")] = Path("judgments.json"),
) -> None:
    """Win rate, sign test and agreement of filled-in files."""
    from rldecoder.cli.judge import score_files

    score_files(key, files, result, console)


@app.command()
def smoke(model: Annotated[str, typer.Argument(help="A name from `rldecoder models`.")]) -> None:
    """Run the frozen model on 1k tokens: throughput, hidden-state shapes, memory."""
    from rldecoder.cli.show import show_smoke

    show_smoke(model, console)


@app.command()
def models() -> None:
    """List the known base models and whether their weights are on this machine."""
    from rldecoder.cli.show import show_models

    show_models(console)


@app.command()
def devices() -> None:
    """List accelerators: memory, utilisation, and who holds a lease."""
    from rldecoder.cli.show import show_devices

    show_devices(console)


def run_command_line() -> int:
    """Do what the command line asks for; its exit code.

    Raises:
        RlDecoderError: what the command raised, or that there is no such command or option.
        KeyboardInterrupt: it was interrupted.
    """
    try:
        # Outside standalone mode typer returns the code of `typer.Exit` (after --help, say).
        code = app(standalone_mode=False)
    except TyperException as error:
        raise BadInputError(
            error.format_message(), "", "`rldecoder --help` shows the commands."
        ) from error
    except typer.Abort as error:
        # typer makes it of an EOFError, which is how truncated files are read.
        raise error.__cause__ or KeyboardInterrupt from None
    if code == TYPER_INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _open(config: Path, store: Path | None, overrides: list[str] | None) -> Run:
    from rldecoder.config.run import load_run_config

    loaded = load_run_config(config, overrides or [])
    from rldecoder.run import open_run  # slow: only for a config that can be used

    return open_run(loaded, store)
