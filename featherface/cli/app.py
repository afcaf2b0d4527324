"""The application: its subcommands, and what every error becomes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from ffkernels import BackendUnavailable, FusedKernelRequired

from ..errors import FeatherFaceError
from .average import average
from .benchmark import benchmark
from .card import card
from .demo import demo
from .detect import detect
from .evaluate import evaluate
from .export import export
from .info import info
from .train import train
from .validate import validate

app = typer.Typer(
    name="featherface",
    help="Find faces and their landmarks; train, measure, export and inspect the detectors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (detect, demo, train, validate, average, card, evaluate, export, info, benchmark):
    app.command()(command)


def _version(value: bool) -> None:
    if value:
        from ffkernels import __version__

        print(f"featherface {__version__}")
        raise typer.Exit


@app.callback()
def _callback(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. May stand anywhere.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Find faces and their landmarks; train, measure, export and inspect the detectors."""


def run(arguments: list[str]) -> int:
    """Run the application and turn whatever happens into an exit code. See :func:`featherface.cli.main`."""
    debug = "--debug" in arguments
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        # Names of files need not be text.
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with _terminated():
            code = app(args=arguments, prog_name="featherface", standalone_mode=False)
        sys.stdout.flush()
        # Newer versions of typer turn an interruption into this code, older ones into Abort.
        if code == 130:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        print("featherface: interrupted", file=sys.stderr)
        return 130
    except Terminated:
        print("featherface: terminated", file=sys.stderr)
        return 128 + signal.SIGTERM
    except BrokenPipeError:
        _silence()
        return 1
    except SystemExit as stop:
        # Typer ends the program itself where a pipe is closed.
        _silence()
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            context = getattr(error, "ctx", None)
            hint = f" (see: {context.command_path} --help)" if context is not None else ""
            if not error.format_message():
                return error.exit_code  # without arguments Typer has printed the help
            return _fail(f"{error.format_message()}{hint}", error.exit_code)
        if debug:
            raise
        if isinstance(error, (FeatherFaceError, FusedKernelRequired, BackendUnavailable)):
            return _fail(str(error))
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "can't allocate" in str(error):
            return _fail("there is not enough memory for this; try --size, --tile or smaller batches")
        if isinstance(error, OSError) and error.strerror:
            where = f"{error.filename}: " if error.filename else ""
            return _fail(f"{where}{error.strerror}")
        if isinstance(error, ValueError) and str(error).startswith("FF_"):
            return _fail(str(error))
        name = type(error).__name__
        return _fail(f"internal error, {name}: {str(error) or 'no message'} (--debug shows where; please report it)", 1)


class Terminated(BaseException):
    """SIGTERM, as an exception, so that whatever is half-written is removed on the way out."""


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """Raises :class:`Terminated` at SIGTERM, where nobody else takes it. A training's steps have their own handler."""

    def handle(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Terminated

    before = None
    # Handlers belong to the main thread; elsewhere the caller has its own.
    with contextlib.suppress(ValueError):
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _fail(sentence: str, code: int = 2) -> int:
    print(f"featherface: error: {' '.join(sentence.split())}", file=sys.stderr)
    return code


def _silence() -> None:
    """Point stdout nowhere, so that the interpreter does not complain when it flushes a closed pipe."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
