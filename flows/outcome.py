"""How a flow of a deployment ends when something foreseeable is wrong: one line in its state.

Prefect's own way is a traceback in the log and the exception's class in the state, which tells
whoever filled in the form nothing that they can act on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from prefect.logging import get_run_logger
from prefect.states import Failed

from rldecoder.errors import RlDecoderError
from rldecoder.terminal import printable

T = TypeVar("T")
NAME = "{parameters.run_name}"
"""The `flow_run_name` of flows whose `parameters` are `RunParameters`."""


def plainly(work: Callable[[], T]) -> T:
    """Do a flow's work; an error of our own becomes a failed state that says it in one line.

    Who calls the flow from Python gets the error itself.
    """
    try:
        return work()
    except RlDecoderError as error:
        said = printable(" ".join(str(error).split()))
        get_run_logger().error("%s", said)
        failed: Any = Failed(message=said, data=error)  # the flow's final state, as Prefect has it
        return failed
