"""`gemma-nb chat`: one reply, or a conversation, streamed to the terminal."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import locale
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import gemma_nb as gnb
from gemma_nb.cli.failure import UsageError, fail
from gemma_nb.cli.table import print_table
from gemma_nb.errors import GemmaNbError

if TYPE_CHECKING:
    from gemma_nb.chat.events import PrefillEvent
    from gemma_nb.chat.session import ChatSession

SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "seed", "max_new_tokens")


def add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's."""
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
            fail(error, 2)
            continue
        if not message.strip():
            continue
        try:
            _reply(session, message, table)
        except KeyboardInterrupt:
            print("[stopped]", file=sys.stderr)
        except GemmaNbError as error:  # said in one line; the conversation goes on
            fail(error, 1)


def _reply(session: ChatSession, message: str, table: bool) -> None:
    """Stream one reply to stdout; leaves no half line, even when interrupted."""
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
        print_table(turn)


@contextlib.contextmanager
def _watched(session: ChatSession, status: _Status) -> Iterator[None]:
    """Say how far a prompt is read that is long enough for that."""

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
