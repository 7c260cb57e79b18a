"""The commands. Settings belong in YAML; commands only say what to do with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.exceptions import TyperException

from rldecoder.cli import starting
from rldecoder.cli.harness import lm_eval
from rldecoder.cli.layout import configs
from rldecoder.cli.options import ConfigPath, SetOption, StoreOption, same_run
from rldecoder.cli.options import open_named as _open
from rldecoder.errors import BadInputError
from rldecoder.terminal import Terminal

if TYPE_CHECKING:
    from rldecoder.opened import Opened

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

MaybeConfig = Annotated[
    str | None,
    typer.Argument(
        metavar="[CONFIG]", help="A run's YAML; not with --release.", show_default=False
    ),
]
ReleaseOption = Annotated[
    str | None,
    typer.Option(
        "--release",
        metavar="DIR",
        help="A release in place of a run: its folder, or owner/name[@revision] on the hub.",
    ),
]
ModelOption = Annotated[
    Path | None,
    typer.Option(
        help="With --release: the folder of the frozen model, where the release cannot fetch it."
    ),
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

    run_and_summarise(opened, (config, store, overrides), until=until, prefect=prefect)


app.command()(starting.init)


@app.command()
def status(
    config: ConfigPath,
    store: StoreOption = None,
    overrides: SetOption = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read and hash every file, as a run does.")
    ] = False,
) -> None:
    """Show each stage's artifact: published, failed gate, interrupted or missing."""
    opened = _open(config, store, overrides)
    from rldecoder.cli.show import show_status

    show_status(opened, console, same_run(config, store, overrides), verify=verify)


@app.command()
def plan(
    config: ConfigPath,
    store: StoreOption = None,
    overrides: SetOption = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="A published device (h100, a100, ...) in place of what `smoke` measured here."
        ),
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="With --device: the share of its peak that is reached.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:
    """Say what each stage will take: tokens, FLOPs, hours, disk, memory. Nothing runs."""
    opened = _open(config, store, overrides)
    from rldecoder.cli.plan import show_plan

    show_plan(opened, console, device=device, share=share, as_json=as_json)


@app.command()
def explain(
    config: MaybeConfig = None,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="The text whose next token is explained.", show_default=False
        ),
    ] = None,
    store: StoreOption = None,
    overrides: SetOption = None,
    release: ReleaseOption = None,
    model: ModelOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a self-contained page to this file.")
    ] = None,
    caveats: Annotated[
        bool, typer.Option("--caveats", help="List the run's caveats; else they are counted.")
    ] = False,
) -> None:
    """Explain the next-token prediction for a prompt, in claims tested by intervention.

    Examples: rldecoder explain configs/quickstart.yaml "The hat is in the";
    rldecoder explain --release my-release/ "The hat is in the".
    """
    if release is not None and prompt is None:
        config, prompt = None, config  # the only text is the prompt
    if prompt is None:
        raise BadInputError(
            "Missing argument 'PROMPT'.",
            "",
            'Example: rldecoder explain CONFIG "The hat is in the"',
        )
    opened = _open_any(config, store, overrides, release, model)
    from rldecoder.cli.show import show_explanation

    show_explanation(opened, prompt, console, as_json=as_json, html=html, list_caveats=caveats)


@app.command(
    help="Serve a finished run on this machine: live prompts, exact ablations, label review."
    "\n\n"
    "Type a prompt and see both models' predictions token by token. Open a token's features, take "
    "one out or amplify it, and see the predictions change: both models are run again. The claims "
    "of an explanation are predictions; each is then tested in the same way. Search features; "
    "review labels by keyboard. Works offline; Ctrl-C stops it."
    "\n\n"
    "Examples: rldecoder serve configs/quickstart.yaml --port 8760; "
    "rldecoder serve --release my-release/"
)
def serve(
    config: MaybeConfig = None,
    store: StoreOption = None,
    overrides: SetOption = None,
    release: ReleaseOption = None,
    model: ModelOption = None,
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
            "reviews.jsonl in the store (of a release: in the current folder)."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback need --allow-remote.")
    ] = "127.0.0.1",
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Let other machines in. There is no login.")
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
    opened = _open_any(config, store, overrides, release, model)
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

    rebuild_report(opened, (config, store, overrides))


@app.command()
def estimate_labels(
    config: ConfigPath, store: StoreOption = None, overrides: SetOption = None
) -> None:
    """Say what labels by a language model would send and cost; nothing is sent."""
    opened = _open(config, store, overrides)
    from rldecoder.cli.estimate import show_estimate

    show_estimate(opened, console)


@app.command(
    help="Write a run for others: a release folder, or its features for other tools."
    "\n\n"
    "`release` writes SAE, decoder, labels with examples, importance, settings and a model card "
    "into one folder that `rldecoder.open_release(DIR)`, `explain --release DIR` and `serve "
    "--release DIR` open without the run's store. `neuronpedia` and `saedashboard` write labelled "
    "features, `delphi` activations."
    "\n\n"
    "Examples: rldecoder export configs/quickstart.yaml release my-release/; "
    "rldecoder export release my-release/ --push owner/name --dry-run"
)
def export(
    config: Annotated[
        Path,
        typer.Argument(
            help="A run's YAML. Left out, a release that is there already can be pushed."
        ),
    ],
    tool: Annotated[
        str, typer.Argument(help="What is written: release, neuronpedia, saedashboard or delphi.")
    ],
    out: Annotated[
        Path | None, typer.Argument(help="A folder that does not exist yet.", show_default=False)
    ] = None,
    store: StoreOption = None,
    overrides: SetOption = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="release: upload it to this repository of the Hugging Face hub, private unless "
            "--public; the token is read from HF_TOKEN alone.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --push: only list what would be uploaded.")
    ] = False,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: everybody may read it.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="release: replace an older release in the folder.")
    ] = False,
    supervised: Annotated[
        bool, typer.Option("--supervised", help="release: with the supervised decoder, too.")
    ] = False,
    licence: Annotated[
        str | None,
        typer.Option(
            "--licence", "--license", help="release: of what is yours in it, such as cc-by-4.0."
        ),
    ] = None,
    model_id: Annotated[
        str | None,
        typer.Option(help="Other tools: the model's name there; default: its name here."),
    ] = None,
    source_set: Annotated[
        str, typer.Option(help="Other tools: the SAE's name there.")
    ] = "rl-decoder",
    author: Annotated[str, typer.Option(help="Your name (Neuronpedia).")] = "RL-Decoder",
    author_id: Annotated[
        str | None,
        typer.Option(help="The site's id of the account that imports (Neuronpedia asks for it)."),
    ] = None,
) -> None:
    """Write a run for others: a release folder, or its features for other tools."""
    from rldecoder.cli.export import Names, Tool, export_features
    from rldecoder.cli.release import RELEASE, Publishing, export_release, push_folder

    publishing = Publishing(push, dry_run, public)
    if out is None:
        if str(config) != RELEASE:
            raise BadInputError(
                "Missing argument 'OUT'.",
                "An export is written into a folder.",
                "Example: rldecoder export configs/quickstart.yaml release my-release/",
            )
        given = {
            "--store": store, "--set": overrides, "--overwrite": overwrite,
            "--supervised": supervised, "--licence": licence,
        }  # fmt: skip
        push_folder(Path(tool), publishing, console, [name for name, v in given.items() if v])
        return
    if tool == RELEASE:
        publishing.check()
        export_release(
            _open(config, store, overrides), out, publishing, console,
            supervised=supervised, overwrite=overwrite, licence=licence,
        )  # fmt: skip
        return
    if tool not in list(Tool):
        raise BadInputError(
            f"Nothing is known of the tool {tool!r}.",
            f"Features can be written for {', '.join(Tool)}; a whole run as a {RELEASE}.",
            "Example: rldecoder export configs/quickstart.yaml saedashboard features/",
        )
    publishing.require_release(tool, overwrite or supervised or licence is not None)
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
def smoke(
    model: Annotated[str, typer.Argument(help="A name from `rldecoder models`.")],
    device: Annotated[str, typer.Option(help="Where it runs: cpu or cuda.")] = "cpu",
) -> None:
    """Run the frozen model on 1k tokens: throughput, hidden-state shapes, memory."""
    from rldecoder.cli.show import show_smoke

    show_smoke(model, console, device)


app.command()(starting.models)
app.command()(starting.settings)


app.command()(starting.devices)


app.command()(configs)
app.command(name="lm-eval")(lm_eval)


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


def _open_any(
    config: str | None,
    store: str | None,
    overrides: list[str] | None,
    release: str | None,
    model: Path | None,
) -> Opened:
    """A run or a release, whichever is named."""
    if release is None:
        if config is None:
            raise BadInputError(
                "Missing argument 'CONFIG'.", "", "Name a run's YAML, or a release with --release."
            )
        if model is not None:
            raise BadInputError(
                "--model is for releases.",
                "A run has the model in its store.",
                "Add --release DIR, or leave it out.",
            )
        return _open(Path(config), store, overrides)
    given = {"CONFIG": config, "--store": store, "--set": overrides}
    superfluous = [name for name, value in given.items() if value]
    if superfluous:
        raise BadInputError(
            f"{', '.join(superfluous)} cannot go with --release.",
            "A release is complete: it needs neither a run's config nor its store.",
            "Leave one of them out.",
        )
    from rldecoder.release.opening import open_release

    # Not among the answer's lines: they may be JSON.
    said = Terminal(stderr=True)
    return open_release(release, model=model, note=lambda text: said.print(text, markup=False))
