"""The command `serve`: open a run's artifacts, or a release, and serve them until Ctrl-C."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from rldecoder import interrupts
from rldecoder.artifacts.catalogue import Clusters, Labels, TrainedExplainer
from rldecoder.cli.collection import no_collection
from rldecoder.errors import BadInputError
from rldecoder.opened import EXPLAINING, Opened
from rldecoder.serve.guard import LOOPBACK

if TYPE_CHECKING:
    from rldecoder.interp.contexts import LatentContexts
    from rldecoder.serve.served import Served

WARM_UP = "The first answer should not wait for anything."


def serve_run(
    run: Opened,
    console: Console,
    *,
    host: str,
    port: int,
    allow_remote: bool,
    host_names: Sequence[str],
    max_tokens: int,
    reviews: Path | None,
) -> None:
    """Serve until interrupted.

    Raises:
        BadInputError: the run has nothing to explain with yet, or the address cannot be used.
    """
    # The cheap refusals come first, before what takes seconds to import and to load.
    hosts = allowed_hosts(host, allow_remote, host_names)
    run.require(EXPLAINING, "to explain")

    def warn(message: str) -> None:
        console.print(f"[yellow]{escape(message)}[/yellow]")

    with listen(host, port) as listener:
        console.print(f"loading {escape(run.name)} ...")
        with no_collection():
            from rldecoder.serve.app import make_app
            from rldecoder.serve.patience import MAX_CONNECTIONS
            from rldecoder.serve.server import make_server

            served = open_served(run, max_tokens=max_tokens, reviews=reviews, say=warn)
            server = make_server(make_app(served, hosts=hosts))
        listener.listen(MAX_CONNECTIONS)  # who follows the address at once waits, is not refused
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}/"
        console.print(f"serving {escape(run.name)} at {address}   (Ctrl-C stops)")
        if allow_remote:
            warn("Other machines may connect, and there is no login.")
        # uvicorn shuts down by itself on Ctrl-C and passes the signal on when it is done.
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
        interrupts.forget()
    console.print("stopped")


def open_served(
    run: Opened,
    *,
    max_tokens: int,
    reviews: Path | None,
    say: Callable[[str], None] = lambda message: None,
) -> Served:
    """Load models and labels, and answer one question, so that the next is fast.

    Args:
        say: told what is left out, and why.
    """
    import torch

    from rldecoder.explain.prompts import tokenize_prompt
    from rldecoder.explain.reading import Reading
    from rldecoder.serve.about import about, example_prompts
    from rldecoder.serve.catalogue import Catalogue
    from rldecoder.serve.code import Code
    from rldecoder.serve.pages import PageFacts
    from rldecoder.serve.served import Served
    from rldecoder.serve.workbench import Workbench

    if run.threads is not None:
        torch.set_num_threads(run.threads)
    bench = Workbench(run.reader(), max_tokens=max_tokens)
    file = reviews or run.reviews
    catalogue = Catalogue(run.artifact(Labels), run.artifact(Clusters), file)

    # Kernels are chosen and memory is taken when they are first used.
    ids = tokenize_prompt(bench.reader.lm, WARM_UP)[: bench.max_tokens]
    reading = Reading(bench.reader, ids.tolist())
    _ = reading.predictions, reading.features()

    report = run.report(say)
    labels = catalogue.labels
    facts = PageFacts(
        run_name=run.name,
        model_name=labels.model_name,
        dtype=str(bench.reader.lm.dtype).removeprefix("torch."),
        hook_layer=labels.hook_layer,
        num_latents=labels.num_latents,
        num_labelled=len(labels.features),
        max_tokens=bench.max_tokens,
        caveats=run.artifact(TrainedExplainer).caveats,
        reviews_file=str(file),
        has_report=report is not None,
        about=about(run),
        examples=example_prompts(run),
    )

    def texts(latent: int, count: int) -> LatentContexts:
        return run.contexts(latent, count=count)

    return Served(bench, catalogue, facts, report, texts, Code(run.python))


def allowed_hosts(host: str, allow_remote: bool, host_names: Sequence[str]) -> list[str]:
    """Names that the Host header may have.

    Raises:
        BadInputError: other machines could connect, and nobody said that they may.
    """
    if host not in ("localhost", "::1") and not _is_loopback(host):
        if not allow_remote:
            raise BadInputError(
                f"Listening on {host} would let other machines in.",
                "The server has no login: whoever reaches it can use the model and write reviews.",
                "Keep 127.0.0.1 and use an SSH tunnel, or add --allow-remote.",
            )
        return [*LOOPBACK, f"[{host}]" if ":" in host else host, *host_names]
    if host_names and not allow_remote:
        raise BadInputError(
            "--host-name is for servers that other machines reach.",
            f"This one listens on {host}.",
            "Leave it out, or add --allow-remote and --host.",
        )
    return [*LOOPBACK, *([] if ":" in host else [host]), *host_names]


def listen(host: str, port: int) -> socket.socket:
    """A bound, not yet listening socket.

    Raises:
        BadInputError: the address or the port cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise BadInputError(
            f"The server cannot listen on {host}, port {port}.",
            f"{error.strerror or error}.",
            "Another program may use it: choose another --port, or 0 for any free one.",
        ) from error
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
