"""The `gemma-nb` command: `chat` in the terminal, `lab` in the browser, `models` to choose from.

Exit codes: 0 done; 1 something failed, said in one line on stderr; 2 wrong usage; 130 interrupted
with Ctrl-C; 141 whoever read the output stopped reading.

JAX is imported only by the commands that compute, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

import gemma_nb as gnb
from gemma_nb.cli.chat import add_chat
from gemma_nb.cli.failure import UsageError, fail
from gemma_nb.cli.lab import add_lab
from gemma_nb.errors import GemmaNbError

INTERRUPTED = 130  # what a shell reports for SIGINT
BROKEN_PIPE = 141  # and for SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
      argv: the arguments; by default those of the process.

    Returns:
      The exit code, see the module's docstring.
    """
    _open_what_is_closed()
    try:
        code = _run(argv)
    except BrokenPipeError:
        code = BROKEN_PIPE
    except KeyboardInterrupt:
        code = INTERRUPTED
    except UsageError as error:
        code = fail(error, 2)
    except (GemmaNbError, OSError) as error:
        code = fail(error, 1)
    return _flushed(code)


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = _parser().parse_args(argv)
    except SystemExit as end:  # after --help, say, whose reader may have stopped reading
        raise SystemExit(_flushed(end.code if isinstance(end.code, int) else 2)) from None
    if sys.stdout is None:
        raise OSError("standard output is closed: there is nowhere to write to")
    code: int = args.run(args)
    return code


def _open_what_is_closed() -> None:
    """Let every command have its three streams, whatever the shell closed or cannot spell."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened is mistaken for it
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that lacks a character shows "?"
        sys.stdout.reconfigure(errors="replace")


def _flushed(code: int) -> int:
    """`code`, or what stands for the output that could not be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:
            broken = isinstance(error, BrokenPipeError)
            # Python flushes once more as it exits; let that go nowhere.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if code == 0:
                code = BROKEN_PIPE if broken else fail(error, 1)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gemma-nb", description="Chat with Gemma, and see what the model computed."
    )
    parser.add_argument("--version", action="version", version=f"gemma-nb {gnb.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_chat(commands)
    add_lab(commands)
    models = commands.add_parser("models", help="what can be loaded here, and how to get the rest")
    models.set_defaults(run=_models)
    return parser


def _models(args: argparse.Namespace) -> int:
    del args
    print(gnb.list_models())
    return 0
