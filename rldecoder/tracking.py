"""wandb, offline unless a key is in the environment and the config asks for online."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rldecoder.config.run import RunConfig
from rldecoder.errors import BadInputError
from rldecoder.reporting import SilentReporter
from rldecoder.urls import without_credentials


class WandbReporter(SilentReporter):
    """Sends metrics and alerts to one wandb run; bars and notes are not its business."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self._run = run
        self._defined: set[str] = set()

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Log under `<stage>/<name>` against `<stage>/step`: stages count their own steps."""
        if stage not in self._defined:
            self._run.define_metric(f"{stage}/step", hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._defined.add(stage)
        self._run.log({f"{stage}/{name}": value for name, value in values.items()}
                      | {f"{stage}/step": step})  # fmt: skip

    def alert(self, message: str) -> None:
        """A wandb alert (kept in the offline log)."""
        self._run.alert(title="rldecoder", text=without_credentials(message)[:500])


@contextmanager
def wandb_reporter(run: RunConfig, folder: Path) -> Iterator[WandbReporter | None]:
    """A wandb run for the length of the block, or None when tracking is off.

    Raises:
        BadInputError: `online` without WANDB_API_KEY, or wandb cannot start.
    """
    mode = run.tracking.wandb
    if mode == "off":
        yield None
        return
    if mode == "online" and not os.environ.get("WANDB_API_KEY"):
        raise BadInputError(
            "tracking.wandb is online but WANDB_API_KEY is not set.",
            "Keys are read from the environment only.",
            "Export the key, or set tracking.wandb: offline.",
        )
    import wandb  # slow to import, and not needed when tracking is off

    folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        # It would send the command line, which may hold `--set mirror=...` with a password.
        x_disable_meta=True,
    )
    try:
        wandb_run = wandb.init(
            project=run.tracking.project,
            name=run.name,
            mode=mode,
            dir=str(folder),
            config=run.model_dump(mode="json"),
            settings=settings,
        )
    except wandb.Error as error:
        raise BadInputError(
            "wandb cannot start a run.",
            without_credentials((str(error).strip() or type(error).__name__).splitlines()[0]),
            "Mend that, or set tracking.wandb: offline, or off.",
        ) from None
    try:
        yield WandbReporter(wandb_run)
    finally:
        wandb_run.finish()
