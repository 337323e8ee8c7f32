"""`interp run … --launcher NAME`: the same run, as one job of a launcher."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import typer

from ..errors import InterpError, PluginError
from ..plugins import SESSION, Plugin

if TYPE_CHECKING:
    from ..launch import Launcher


def run_elsewhere(
    launcher: Launcher, command: Callable[..., None], plugin: Plugin, arguments: Mapping[str, Any]
) -> None:
    """Run a method or a recipe as a job, and print what it printed.

    Args:
        launcher: that runs it.
        command: `interp run`.
        plugin: what it runs.
        arguments: of the command; paths among them are relative to this folder.

    Raises:
        PluginError: a plugin that another process does not have, or a job without an end.
        InterpError: what the run itself refused.
        Exit: the run's own exit status, if it is not 0.
    """
    from ..launch import Job

    if plugin.dist == SESSION:
        raise PluginError(f"{plugin.label} is registered in this process alone; a job needs a plugin that is installed")
    (outcome,) = launcher.run([Job(as_job, (command, os.getcwd(), dict(arguments)))])
    if not outcome.ok:
        last = outcome.error.strip().splitlines()[-1]
        raise PluginError(
            f"launcher {launcher.name!r} brought no end of {plugin.label}: {last}\n{outcome.error.strip()}"
        )
    printed, refusal, status = outcome.value
    sys.stdout.write(printed)
    if refusal:
        raise InterpError(refusal)
    if status:
        raise typer.Exit(status)


def as_job(command: Callable[..., None], folder: str, arguments: Mapping[str, Any]) -> tuple[str, str, int]:
    """What the job does: the run, in the folder where the command was given.

    Returns:
        What it printed, the error that it ended with, and its exit status.
    """
    printed = io.StringIO()
    refusal, status = "", 0
    try:
        with contextlib.redirect_stdout(printed), contextlib.chdir(folder):
            command(**arguments)
    except typer.Exit as error:
        status = error.exit_code
    except (InterpError, OSError) as error:
        refusal = str(error)
    return printed.getvalue(), refusal, status
