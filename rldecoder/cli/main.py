"""The program `rldecoder`; its commands are in `rldecoder.cli.commands`, slow to import."""

from __future__ import annotations

from rldecoder.entry import guarded, leave


def main() -> None:
    """Entry point: turns errors into one message and an exit code."""
    leave(guarded(_command_line))


def _command_line() -> int:
    from rldecoder.cli.commands import run_command_line

    return run_command_line()


if __name__ == "__main__":
    main()
