"""Runs `rldecoder` commands in forks of a process that has imported everything already.

An interpreter and its imports cost ten CPU seconds; a fork costs none. `python -m
tests.fork_server` reads lines of JSON (`arguments`, the files `out` and `err`, the folder `cwd`,
and `env`, added to the environment), and answers each with two lines: the child's process id, once
it is about to begin, and its exit code. Its other end is `tests.forked`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import torch
import transformers  # noqa: F401

import rldecoder.cli.commands
import rldecoder.cli.run
import rldecoder.explain.explanation  # noqa: F401
from rldecoder import interrupts, provenance
from rldecoder.cli.main import main
from rldecoder.stages.table import STAGES


def child(request: dict[str, Any], answers: int) -> None:
    """Become the command. A signal that comes before it listens waits until it does."""
    signal.pthread_sigmask(signal.SIG_BLOCK, interrupts.SIGNALS)
    original = interrupts.listen

    def listen() -> None:
        original()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupts.SIGNALS)

    interrupts.listen = listen
    for place, file in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), place)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = ["rldecoder", *request["arguments"]]
    os.write(answers, f"{os.getpid()}\n".encode())
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(int(end.code or 0))  # tearing down what the server imported takes a second


def serve() -> None:
    """Fork for every line of stdin, and wait for the child."""
    torch.set_num_threads(1)
    for stage in STAGES:
        provenance.source_digest(stage.run.__module__)  # two seconds that no child needs to spend
    answers = os.dup(1)
    pid = 0
    for line in sys.stdin:
        if pid:
            os.waitpid(pid, 0)
        request: dict[str, Any] = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(request, answers)
        # Collected with the next line only: until then a signal for it reaches no other process.
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        os.write(answers, f"{code}\n".encode())


if __name__ == "__main__":
    serve()
