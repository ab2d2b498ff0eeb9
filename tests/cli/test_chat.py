"""`gemma-nb chat`: a reply, a conversation, and the table of alternatives."""

from __future__ import annotations

import io
import locale
import sys

import pytest

from gemma_nb import cli
from gemma_nb.errors import NonFiniteLogitsError
from tests.cli.fakes import FakeSampling, FakeSession, pipe_in, speak, token, type_in


def test_chat_streams_the_reply_and_nothing_else(capsys, loaded):
    assert cli.main(["chat", "What is the capital of France?"]) == 0
    out, err = capsys.readouterr()
    assert out == "Paris.\n"
    assert err == ""
    assert loaded == ["gemma3-270m"]
    assert FakeSession.last.heard == ["What is the capital of France?"]


def test_a_terminal_is_told_how_far_a_long_prompt_is_read(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["chat", "What is the capital of France?"]) == 0
    out, err = capsys.readouterr()
    assert out == "Paris.\n"
    wiped = "\r\x1b[K"
    assert err == f"Thinking ...{wiped}Reading: 1,500 of 3,000 tokens ...{wiped}"
    assert FakeSession.last.listeners == []


def test_every_token_is_flushed_as_it_comes(monkeypatch):
    written: list[str] = []

    class Terminal(io.StringIO):
        def flush(self) -> None:
            written.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Terminal())
    speak(monkeypatch, token(0, "a"), token(1, ""), token(2, "b"))
    assert cli.main(["chat", "Hello"]) == 0
    assert written[:3] == ["a", "ab", "ab\n"]


def test_chat_keeps_the_recommended_sampling_unless_told(loaded):
    cli.main(["chat", "Hello", "--model", "other.gguf", "--system", "Be brief."])
    assert FakeSession.last.sampling == FakeSampling()
    assert FakeSession.last.options == {"system": "Be brief.", "template": "auto"}
    assert loaded == ["other.gguf"]

    options = "--temperature 0 --top-k 3 --top-p 0.5 --min-p 0.1 --seed 0 --max-new-tokens 9"
    cli.main(["chat", "Hello", "--template", "none", *options.split()])
    assert FakeSession.last.sampling == FakeSampling(0, 3, 0.5, 0.1, 0, 9)
    assert FakeSession.last.options["template"] == "none"


def test_message_is_read_from_a_pipe(monkeypatch, capsys):
    type_in(monkeypatch, "first line\nsecond line\n", tty=False)
    assert cli.main(["chat"]) == 0
    assert FakeSession.last.heard == ["first line\nsecond line"]
    assert capsys.readouterr().out == "Paris.\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_is_piped_in_is_read_as_utf_8_in_every_locale(monkeypatch, encoding):
    pipe_in(monkeypatch, b"\xef\xbb\xbfun caf\xc3\xa9\n", encoding)
    assert cli.main(["chat"]) == 0
    assert FakeSession.last.heard == ["un café"]


def test_bytes_that_are_no_text_are_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(locale, "getpreferredencoding", lambda _: "UTF-8")
    pipe_in(monkeypatch, "un café".encode("latin-1"))
    assert cli.main(["chat"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gemma-nb: what is piped in is no UTF-8 text (byte 6 is 0xE9)")
    assert err.count("\n") == 1
    # In a locale of such bytes they are text.
    monkeypatch.setattr(locale, "getpreferredencoding", lambda _: "ISO-8859-1")
    pipe_in(monkeypatch, "un café".encode("latin-1"))
    assert cli.main(["chat"]) == 0
    assert FakeSession.last.heard == ["un café"]


def test_arguments_arrive_as_text_in_an_ascii_locale(capsys):
    asked = "café".encode().decode("ascii", "surrogateescape")
    if sys.getfilesystemencoding() == "utf-8":
        assert cli.main(["chat", asked, "--system", asked]) == 0
        assert FakeSession.last.heard == ["café"]
        assert FakeSession.last.options["system"] == "café"
        assert cli.main(["chat", "caf\udce9"]) == 2
        assert "gemma-nb: the message is no UTF-8 text" in capsys.readouterr().err


def test_conversation_in_a_terminal_goes_on_until_it_is_closed(monkeypatch, capsys):
    type_in(monkeypatch, "Hello\n\nAnd then?\n", tty=True)
    assert cli.main(["chat"]) == 0
    assert FakeSession.last.heard == ["Hello", "And then?"]
    assert capsys.readouterr().out.count("Paris.\n") == 2


def test_conversation_goes_on_after_ctrl_c_and_after_an_error(monkeypatch, capsys):
    for trouble in (KeyboardInterrupt(), NonFiniteLogitsError("NaN at position 5")):
        speak(monkeypatch, token(0, "Par"), trouble)
        type_in(monkeypatch, "Hello\nAgain\n", tty=True)
        assert cli.main(["chat"]) == 0
        assert FakeSession.last.heard == ["Hello", "Again"]
        out, err = capsys.readouterr()
        assert out.count("Par\n") == 2
        assert err.count(str(trouble) or "[stopped]") == 2


def test_ctrl_c_ends_the_line_and_the_command(monkeypatch, capsys):
    speak(monkeypatch, token(0, "Par"), KeyboardInterrupt())
    assert cli.main(["chat", "Hello"]) == 130
    assert capsys.readouterr().out == "Par\n"


def test_reply_that_was_cut_says_why_on_stderr(monkeypatch, capsys):
    speak(monkeypatch, token(0, "Par"), finish=("length", "the context is full"))
    assert cli.main(["chat", "Hello"]) == 0
    assert capsys.readouterr() == ("Par\n", "[the context is full]\n")


def test_table_lists_alternatives_before_and_after_the_sampler(monkeypatch, capsys):
    end = token(1, "", piece="<end_of_turn>", rank=9, alternatives=token(0, "").alternatives)
    speak(monkeypatch, token(0, " A\n\x07"), end)
    assert cli.main(["chat", "Hello", "--top-k-table"]) == 0
    reply, table = capsys.readouterr().out.split("\n\n")
    assert reply == "A\n\x07"
    assert [line.split() for line in table.splitlines()] == [
        ["#", "token", "before", "after", "rank", "entropy"],
        ["0", "·the", "50.00%", "37.50%", "1", "1.250"],
        [">", "·A⏎\\x07", "25.00%", "50.00%", "2"],
        ["1", "·the", "50.00%", "37.50%", "1", "1.250"],
        ["25.00%", "50.00%", "2"],  # the empty text of a rival
        [">", "<end_of_turn>", "25.00%", "50.00%", "10"],
    ]


def test_table_stays_in_column_with_wide_characters(monkeypatch, capsys):
    speak(monkeypatch, token(0, "日本", alternatives=()), token(1, "ab", alternatives=()))
    cli.main(["chat", "Hello", "--top-k-table"])
    wide, narrow = capsys.readouterr().out.splitlines()[-2:]
    assert len(wide) == len(narrow) - 2


def test_error_in_a_reply_keeps_what_was_said(monkeypatch, capsys):
    speak(monkeypatch, token(0, "Par"), NonFiniteLogitsError("NaN at position 5"))
    assert cli.main(["chat", "Hello"]) == 1
    assert capsys.readouterr() == ("Par\n", "gemma-nb: NaN at position 5\n")
