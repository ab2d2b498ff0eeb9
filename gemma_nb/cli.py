"""The `gemma-nb` command: `chat` in the terminal, `lab` in the browser, `models` to choose from.

Exit codes: 0 done; 1 something failed, said in one line on stderr; 2 wrong usage; 130 interrupted
with Ctrl-C; 141 whoever read the output stopped reading.

JAX is imported only by the commands that compute, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import locale
import math
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import gemma_nb as gnb
from gemma_nb.errors import GemmaNbError

if TYPE_CHECKING:
    from gemma_nb.chat.events import PrefillEvent
    from gemma_nb.chat.records import TokenRecord
    from gemma_nb.chat.session import ChatSession
    from gemma_nb.chat.turns import Turn

NOTEBOOK = "01_chat.ipynb"
ALTERNATIVES_SHOWN = 5
INTERRUPTED = 130  # what a shell reports for SIGINT
BROKEN_PIPE = 141  # and for SIGPIPE
VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥"})
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "seed", "max_new_tokens")


class UsageError(Exception):
    """The command line asks for something that cannot be."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

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
        code = _fail(error, 2)
    except (GemmaNbError, OSError) as error:
        code = _fail(error, 1)
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
    """Lets every command have its three streams, whatever the shell closed or cannot spell."""
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
                code = BROKEN_PIPE if broken else _fail(error, 1)
    return code


def _fail(error: Exception, code: int) -> int:
    with contextlib.suppress(OSError):  # nobody listens
        print("gemma-nb:", " ".join(str(error).split()), file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gemma-nb", description="Chat with Gemma, and see what the model computed."
    )
    parser.add_argument("--version", action="version", version=f"gemma-nb {gnb.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_chat(commands)
    _add_lab(commands)
    models = commands.add_parser("models", help="what can be loaded here, and how to get the rest")
    models.set_defaults(run=_models)
    return parser


def _add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    chat = commands.add_parser(
        "chat",
        help="chat in the terminal",
        description="Streams the model's reply. Without a message: a conversation in a terminal, "
        "or one reply to what is piped in. Sampling options that are not given are those "
        "recommended for the model.",
        allow_abbrev=False,
    )
    chat.add_argument("message", nargs="?", help="what to say")
    chat.add_argument("--model", default="gemma3-270m", help="a name or a path (%(default)s)")
    chat.add_argument("--system", help="instructions for the whole conversation")
    chat.add_argument(
        "--template", default="auto", help='"auto", "gemma", "transcript" or "none" (%(default)s)'
    )
    chat.add_argument("--temperature", type=float, help="0 takes the most likely token, always")
    chat.add_argument("--top-k", type=int, help="sample among the K most likely tokens")
    chat.add_argument("--top-p", type=float, help="among the likeliest that add up to P")
    chat.add_argument("--min-p", type=float, help="among those at least P times the likeliest")
    chat.add_argument("--seed", type=int, help="the same seed gives the same reply")
    chat.add_argument("--max-new-tokens", type=int, help="the longest reply, in tokens")
    chat.add_argument(
        "--top-k-table",
        action="store_true",
        help="print, after the reply, what the model had considered at every token",
    )
    chat.set_defaults(run=_chat)


def _add_lab(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    lab = commands.add_parser(
        "lab",
        help="JupyterLab on the chat notebook",
        description=f"Opens notebooks/{NOTEBOOK} or {NOTEBOOK} of the current folder, which is "
        "written there first if there is none.",
    )
    lab.add_argument("--port", type=int, default=8888, help="the first port to try (%(default)s)")
    lab.add_argument("--no-browser", action="store_true", help="print the URL, open nothing")
    lab.set_defaults(run=_lab)


# chat


def _chat(args: argparse.Namespace) -> int:
    for name in ("message", "system", "template"):
        setattr(args, name, _spelled(getattr(args, name), name))
    message = args.message
    if message is None and not sys.stdin.isatty():
        message = _piped().strip()
    if message is not None and not message.strip():
        raise UsageError('there is no message: gemma-nb chat "Hello"')
    session = _session(args)
    if message is None:
        return _converse(session, args.top_k_table)
    _reply(session, message, args.top_k_table)
    return 0


def _piped() -> str:
    """All of standard input, as UTF-8 whatever the locale says, else as that says.

    Raises:
      UsageError: it is no text.
    """
    raw = getattr(sys.stdin, "buffer", None)
    if raw is None:  # replaced by a program that calls `main`
        return sys.stdin.read()
    content = raw.read()
    try:
        return str(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        problem = error
    encoding = codecs.lookup(locale.getpreferredencoding(False)).name
    if encoding not in ("utf-8", "ascii"):
        with contextlib.suppress(UnicodeDecodeError):
            return str(content.decode(encoding))
    raise UsageError(
        f"what is piped in is no UTF-8 text (byte {problem.start} is "
        f"0x{content[problem.start]:02X}); convert it first: iconv -f latin1 -t utf-8"
    )


def _spelled(text: str | None, what: str) -> str | None:
    """An argument as text: in a locale without its characters it arrives as the bytes it is.

    Raises:
      UsageError: they are no text.
    """
    if text is None or not any("\ud800" <= c <= "\udfff" for c in text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise UsageError(f"the {what} is no UTF-8 text; convert it first") from None


def _session(args: argparse.Namespace) -> ChatSession:
    given = {name: getattr(args, name) for name in SAMPLING_OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        model, tokenizer = gnb.load(args.model)
        session = gnb.ChatSession(model, tokenizer, system=args.system, template=args.template)
        session.sampling = dataclasses.replace(session.sampling, **given)
    except ValueError as error:
        raise UsageError(error) from error
    return session


def _converse(session: ChatSession, table: bool) -> int:
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (gives `input` its history and editing keys)
    print("Ctrl-C stops a reply, Ctrl-D ends the conversation.", file=sys.stderr)
    while True:
        try:
            message = _spelled(input("> "), "message") or ""
        except EOFError:
            print()
            return 0
        except (UnicodeError, UsageError) as error:
            _fail(error, 2)
            continue
        if not message.strip():
            continue
        try:
            _reply(session, message, table)
        except KeyboardInterrupt:
            print("[stopped]", file=sys.stderr)
        except GemmaNbError as error:  # said in one line; the conversation goes on
            _fail(error, 1)


def _reply(session: ChatSession, message: str, table: bool) -> None:
    """Streams one reply to stdout; leaves no half line, even when interrupted."""
    last = ""
    try:
        with _Status("Thinking ...") as status, _watched(session, status):
            for event in session.stream(message):
                text = event.text
                if not last and session.template.strip_reply:
                    text = text.lstrip()
                if text:
                    status.clear()
                    print(text, end="", flush=True)
                    last = text
    finally:
        if last and not last.endswith("\n"):
            print(flush=True)
    turn = session.turns[-1]
    if turn.finish_reason != "stop":
        print(f"[{turn.finish_detail}]", file=sys.stderr)
    if table:
        print()
        _print_table(turn)


@contextlib.contextmanager
def _watched(session: ChatSession, status: _Status) -> Iterator[None]:
    """Says how far a prompt is read that is long enough for that."""

    def say(event: PrefillEvent) -> None:
        if event.done < event.total:
            status.say(f"Reading: {event.done:,} of {event.total:,} tokens ...")

    forget = session.on_prefill(say)
    try:
        yield
    finally:
        forget()


class _Status:
    """Says on a terminal what is going on, until there is something better to show."""

    def __init__(self, text: str) -> None:
        self._first, self._shown = text, False

    def __enter__(self) -> _Status:
        self.say(self._first)
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def say(self, text: str) -> None:
        self.clear()
        if sys.stderr.isatty():
            self._shown = True
            print(text, end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            self._shown = False
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# the table of alternatives


def _print_table(turn: Turn) -> None:
    """Prints, per token of the reply, the chosen one (marked ">") among its alternatives.

    Probabilities are the model's ("before" the sampler) and those that were drawn from ("after"
    temperature, top-k and so on).  Rank 1 is the model's most likely token; the entropy, in nats,
    is that of the model's distribution.
    """
    print(f"{'#':>4}   {'token':<20} {'before':>8} {'after':>8} {'rank':>6} {'entropy':>8}")
    for token in turn.tokens:
        for row in _table_rows(token):
            print(row)


def _table_rows(token: TokenRecord) -> Iterator[str]:
    rows = [
        (a.token_id, a.text, a.logprob, a.probability, rank)
        for rank, a in enumerate(token.alternatives[:ALTERNATIVES_SHOWN])
    ]
    if token.token_id not in [row[0] for row in rows]:
        rows.append((token.token_id, token.piece, token.logprob, token.probability, token.rank))
    number, entropy = f"{token.index:>4}", f" {token.entropy:8.3f}"
    for token_id, text, logprob, probability, rank in rows:
        mark = ">" if token_id == token.token_id else " "
        yield (
            f"{number:>4} {mark} {_pad(_visible(text), 20)}"
            f" {math.exp(logprob):8.2%} {probability:8.2%} {rank + 1:6d}{entropy}"
        )
        number = entropy = ""  # said once per token


def _visible(text: str) -> str:
    """The text with spaces, line breaks and other unprintable characters made visible."""
    shown = text.translate(VISIBLE)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def _pad(text: str, width: int) -> str:
    # East Asian wide characters take two columns of a terminal.
    columns = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
    return text + " " * max(0, width - columns)


# lab and models


def _lab(args: argparse.Namespace) -> int:
    if not 0 <= args.port <= 65535:
        raise UsageError(f"--port {args.port}: a port is a number from 0 (any free one) to 65535")
    try:
        from jupyterlab.labapp import LabApp
    except ImportError as error:
        raise UsageError('JupyterLab is not installed here: pip install "gemma_nb[app]"') from error
    options = [
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={args.port}",
        f"--ServerApp.root_dir={Path.cwd()}",
        # Not as an argument: then the printed URL would not lead to the notebook.
        f"--LabApp.default_url=/lab/tree/{_notebook().as_posix()}",
        "--ServerApp.log_level=WARN",  # leaves the URL as the last thing on the screen
        # Nothing is asked of a server elsewhere: neither for a newer version nor for news.
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.news_url=None",
    ]
    if args.no_browser or not _has_browser():
        options.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--allow-root")  # it is bound to this machine and asks for its token
    LabApp.launch_instance(options)
    return 0


def _has_browser() -> bool:
    # Without a display, Python's webbrowser would start a text browser over the server's log.
    if sys.platform.startswith("linux"):
        return any(name in os.environ for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    return True


def _notebook() -> Path:
    """The chat notebook of this folder, written first if there is none."""
    for here in (Path("notebooks", NOTEBOOK), Path(NOTEBOOK)):
        if here.exists():
            return here
    package = Path(__file__).parent
    # In a wheel the starter notebook lies inside the package, in a checkout beside it.
    homes = (package / "_notebooks", package.parent / "notebooks")
    starter = next(home / NOTEBOOK for home in homes if (home / NOTEBOOK).exists())
    shutil.copyfile(starter, NOTEBOOK)
    print(f"Wrote {NOTEBOOK}", file=sys.stderr)
    return Path(NOTEBOOK)


def _models(args: argparse.Namespace) -> int:
    del args
    print(gnb.list_models())
    return 0
