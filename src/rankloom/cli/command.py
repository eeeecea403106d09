"""How every command fails: one clear message on standard error and an exit code, the traceback only with `--debug`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from rankloom.errors import RankloomError, SettingsError, TargetError, Terminated, one_line, printable

USAGE, RUNTIME, INTERRUPTED = 2, 1, 130
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def guarded(function: Callable[..., None]) -> Callable[..., None]:
    """The command with `--debug`, its errors as messages. Exit codes: 2 for usage and configuration, 1 for the rest,
    128 + its number after a signal that a run heard (130 SIGINT, 143 SIGTERM).
    """
    hints = typing.get_type_hints(function, include_extras=True)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, debug: bool = False, **options: Any) -> None:
        if debug:
            function(*args, **options)
            return
        try:
            with for_people():
                function(*args, **options)
        except RankloomError as error:
            code = USAGE if isinstance(error, (SettingsError, TargetError)) else RUNTIME
            raise _exit(f"error: {error}" if speaks() or _untold(error) else None, code) from error
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(RUNTIME) from None
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            raise _exit(f"error: {place}{error.strerror or error}", RUNTIME) from error
        except KeyboardInterrupt as error:
            raise _exit(str(error) or "interrupted", INTERRUPTED) from None
        except Terminated as error:
            with contextlib.suppress(OSError):  # after SIGHUP the terminal is gone
                typer.echo(printable(str(error)), err=True)
            raise

    parameters = [p.replace(annotation=hints[p.name]) for p in signature.parameters.values()]
    own = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    run.__signature__ = signature.replace(parameters=[*parameters, own])  # type: ignore[attr-defined]
    run.__annotations__ = {**hints, "debug": Debug}
    return run


@contextlib.contextmanager
def for_people() -> Iterator[None]:
    """Warnings as one line each, said once, without the place in the source; none that are for programmers alone. What
    is noted of data comes with their summary.
    """
    log = logging.getLogger("rankloom.data")
    before, level, seen = warnings.formatwarning, log.level, set[str]()

    def line(message: Any, category: type[Warning], *place: Any, **more: Any) -> str:
        said = f"warning: {one_line(str(message))}\n"
        told = said in seen or issubclass(category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning))
        seen.add(said)
        return "" if told else said

    warnings.formatwarning = line
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        warnings.formatwarning = before
        log.setLevel(level)


def speaks() -> bool:
    """True in the one of several processes that prints; what fails in one fails in all, and is told once."""
    return os.environ.get("RANK", "0") == "0"


def _untold(error: RankloomError) -> bool:
    from rankloom.train.processes import UntoldError

    return isinstance(error, UntoldError)


def _exit(message: str | None, code: int) -> typer.Exit:
    if message is not None:
        typer.echo(printable(message), err=True)
    return typer.Exit(code)
