"""The command line, on a session that says what it is told to."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gemma_nb
from gemma_nb import cli
from gemma_nb.chat.events import PrefillEvent
from gemma_nb.errors import ModelNotInstalledError, NonFiniteLogitsError

REPO = Path(__file__).parents[1]
WITHOUT_JUPYTERLAB = "import sys; sys.modules['jupyterlab.labapp'] = None; import gemma_nb.cli; "


@dataclasses.dataclass(frozen=True)
class FakeSampling:
    temperature: float = 0.5
    top_k: int | None = 64
    top_p: float | None = 0.95
    min_p: float | None = None
    seed: int | None = None
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be 1 or more, got {self.top_k}")


def token(index: int, text: str, **changes: Any) -> SimpleNamespace:
    """A token with probability 1/2, behind " the" in the model's own order."""
    fields: dict[str, Any] = {
        "index": index,
        "token_id": 100 + index,
        "text": text,
        "piece": text,
        "logprob": math.log(0.25),
        "probability": 0.5,
        "rank": 1,
        "entropy": 1.25,
        "alternatives": (
            SimpleNamespace(token_id=7, text=" the", logprob=math.log(0.5), probability=0.375),
            SimpleNamespace(
                token_id=100 + index, text=text, logprob=math.log(0.25), probability=0.5
            ),
        ),
    }
    return SimpleNamespace(**(fields | changes))


class FakeSession:
    """Answers every message with `tokens`, or raises what stands among them."""

    tokens: tuple[Any, ...] = (token(0, " Paris"), token(1, ".\n"))
    finish = ("stop", "the reply is complete")
    last: FakeSession

    def __init__(self, model: str, tokenizer: str, **options: Any) -> None:
        assert (model, tokenizer) == ("the model", "the tokenizer")
        if options["template"] == "wrong":
            raise ValueError("unknown template 'wrong'")
        self.options = options
        self.sampling = FakeSampling()
        self.template = SimpleNamespace(strip_reply=True)
        self.turns: tuple[Any, ...] = ()
        self.heard: list[str] = []
        self.listeners: list[Any] = []
        FakeSession.last = self

    def on_prefill(self, listener: Any) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def stream(self, text: str) -> Iterator[Any]:
        self.heard.append(text)
        for done in (1500, 3000):
            for listener in self.listeners:
                listener(PrefillEvent(done, 3000))
        for item in self.tokens:
            if isinstance(item, BaseException):
                raise item
            yield item
        reason, detail = self.finish
        turn = SimpleNamespace(tokens=self.tokens, finish_reason=reason, finish_detail=detail)
        self.turns = (*self.turns, text, turn)


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts fakes in the place of the real model; holds the sources that were loaded."""
    sources: list[str] = []

    def load(source: str) -> tuple[str, str]:
        if source == "absent":
            raise ModelNotInstalledError("not here:\n  pip install it")
        sources.append(source)
        return "the model", "the tokenizer"

    monkeypatch.setitem(vars(gemma_nb), "load", load)
    monkeypatch.setitem(vars(gemma_nb), "ChatSession", FakeSession)
    return sources


def speak(monkeypatch: pytest.MonkeyPatch, *tokens: Any, finish: tuple[str, str] | None = None):
    monkeypatch.setattr(FakeSession, "tokens", tokens)
    if finish:
        monkeypatch.setattr(FakeSession, "finish", finish)


def type_in(monkeypatch: pytest.MonkeyPatch, text: str, *, tty: bool) -> None:
    stdin = io.StringIO(text)
    stdin.isatty = lambda: tty  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stdin)


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


def pipe_in(monkeypatch: pytest.MonkeyPatch, content: bytes, encoding: str = "utf-8") -> None:
    stdin = io.TextIOWrapper(io.BytesIO(content), encoding=encoding)
    monkeypatch.setattr(sys, "stdin", stdin)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_is_piped_in_is_read_as_utf_8_in_every_locale(monkeypatch, encoding):
    pipe_in(monkeypatch, b"\xef\xbb\xbfun caf\xc3\xa9\n", encoding)
    assert cli.main(["chat"]) == 0
    assert FakeSession.last.heard == ["un café"]


def test_bytes_that_are_no_text_are_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli.locale, "getpreferredencoding", lambda _: "UTF-8")
    pipe_in(monkeypatch, "un café".encode("latin-1"))
    assert cli.main(["chat"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gemma-nb: what is piped in is no UTF-8 text (byte 6 is 0xE9)")
    assert err.count("\n") == 1
    # In a locale of such bytes they are text.
    monkeypatch.setattr(cli.locale, "getpreferredencoding", lambda _: "ISO-8859-1")
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


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_a_stream_that_is_closed_is_no_traceback(monkeypatch, capsys, name):
    """Python has None in its place."""
    monkeypatch.setattr(sys, name, None)
    code = cli.main(["chat", "Hello"])
    out, err = capsys.readouterr()
    if name == "stdout":
        assert (code, err) == (
            1,
            "gemma-nb: standard output is closed: there is nowhere to write to\n",
        )
    else:
        getattr(sys, name).close()
        assert (code, out, err) == (0, "Paris.\n", "")


def test_a_closed_standard_input_holds_no_message(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["chat"]) == 2
    sys.stdin.close()
    assert "there is no message" in capsys.readouterr().err


def test_output_that_cannot_be_written_is_said(monkeypatch, capsys):
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setitem(vars(gemma_nb), "list_models", lambda: "a table")
    assert cli.main(["models"]) == 1
    assert capsys.readouterr().err == "gemma-nb: [Errno 28] No space left on device\n"


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


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "absent", "Hello"], 1, "gemma-nb: not here: pip install it\n"),
        (["--top-k", "0", "Hello"], 2, "gemma-nb: top_k must be 1 or more, got 0\n"),
        (["--template", "wrong", "Hello"], 2, "gemma-nb: unknown template 'wrong'\n"),
        (["  "], 2, 'gemma-nb: there is no message: gemma-nb chat "Hello"\n'),
    ],
)
def test_errors_are_one_line_on_stderr(arguments, code, message, capsys):
    assert cli.main(["chat", *arguments]) == code
    assert capsys.readouterr() == ("", message)


def test_error_in_a_reply_keeps_what_was_said(monkeypatch, capsys):
    speak(monkeypatch, token(0, "Par"), NonFiniteLogitsError("NaN at position 5"))
    assert cli.main(["chat", "Hello"]) == 1
    assert capsys.readouterr() == ("Par\n", "gemma-nb: NaN at position 5\n")


@pytest.mark.parametrize("arguments", [[], ["dance"], ["chat", "--top-k", "many", "Hello"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert "usage: gemma-nb" in capsys.readouterr().err


def test_models_prints_the_list(monkeypatch, capsys):
    monkeypatch.setitem(vars(gemma_nb), "list_models", lambda: "a table of models")
    assert cli.main(["models"]) == 0
    assert capsys.readouterr().out == "a table of models\n"


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, **options
    )


def test_version_as_a_module():
    assert run("-m", "gemma_nb", "--version").stdout == f"gemma-nb {gemma_nb.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["lab", "--help"]])
def test_help_does_not_import_jax(arguments):
    done = run("-X", "importtime", "-m", "gemma_nb", *arguments)
    assert done.returncode == 0
    assert "usage: gemma-nb" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "gemma_nb.cli" in imported
    assert not imported & {"jax", "numpy", "matplotlib", "ipywidgets", "jupyterlab"}


def test_reader_that_stops_reading_is_no_error():
    program = (
        "import sys, gemma_nb, gemma_nb.cli\n"
        "vars(gemma_nb)['list_models'] = lambda: 'x' * 1_000_000\n"
        "sys.exit(gemma_nb.cli.main(['models']))\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_character_that_the_terminal_lacks_is_no_error():
    program = (
        "import sys, gemma_nb, gemma_nb.cli\n"
        "vars(gemma_nb)['list_models'] = lambda: 'caf\\u00e9'\n"
        "sys.exit(gemma_nb.cli.main(['models']))\n"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    assert run("-c", program, env=environment).stdout == "caf?\n"


# lab


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The argument lists JupyterLab was started with, instead of a server."""
    calls: list[list[str]] = []
    fake = SimpleNamespace(LabApp=SimpleNamespace(launch_instance=calls.append))
    monkeypatch.setitem(sys.modules, "jupyterlab", SimpleNamespace(labapp=fake))
    monkeypatch.setitem(sys.modules, "jupyterlab.labapp", fake)
    return calls


def test_lab_writes_the_starter_notebook_once(tmp_path, monkeypatch, capsys, launched):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["lab", "--port", "8899", "--no-browser"]) == 0
    written = tmp_path / "01_chat.ipynb"
    assert json.loads(written.read_text(encoding="utf-8"))["nbformat"] == 4
    assert "Wrote 01_chat.ipynb" in capsys.readouterr().err

    written.write_text("the user's own", encoding="utf-8")
    assert cli.main(["lab"]) == 0
    assert written.read_text(encoding="utf-8") == "the user's own"
    assert {
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.port=8899",
        f"--ServerApp.root_dir={tmp_path}",
        "--LabApp.default_url=/lab/tree/01_chat.ipynb",
        "--no-browser",
    } <= set(launched[0])
    assert "--ServerApp.port=8888" in launched[1]


def test_lab_asks_no_server_for_updates_or_news(monkeypatch, tmp_path, launched):
    """As JupyterLab itself understands the options, and whatever its configuration says."""
    monkeypatch.chdir(tmp_path)
    cli.main(["lab"])
    monkeypatch.undo()  # the real one from here on
    from jupyterlab import NeverCheckForUpdate
    from jupyterlab.labapp import LabApp
    from traitlets.config import Config

    lab = LabApp()
    lab.update_config(Config(LabApp={"news_url": "https://example.org/feed.xml"}))
    lab.parse_command_line([o for o in launched[0] if o.startswith("--LabApp.")])
    assert lab.news_url is None
    assert lab.check_for_updates_class is NeverCheckForUpdate


def test_lab_opens_the_notebook_of_a_checkout(monkeypatch, launched):
    monkeypatch.chdir(REPO)
    assert cli.main(["lab"]) == 0
    assert "--LabApp.default_url=/lab/tree/notebooks/01_chat.ipynb" in launched[0]
    assert not (REPO / "01_chat.ipynb").exists()


def test_lab_opens_a_browser_only_where_there_is_a_screen(monkeypatch, launched):
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    cli.main(["lab"])
    monkeypatch.setenv("DISPLAY", ":0")
    cli.main(["lab"])
    assert ["--no-browser" in call for call in launched] == [True, False]


def test_lab_allows_root_only_to_root(monkeypatch, launched):
    monkeypatch.chdir(REPO)
    for user in (0, 1000):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user, raising=False)
        cli.main(["lab"])
    assert ["--allow-root" in call for call in launched] == [True, False]


def test_lab_refuses_an_impossible_port(capsys, launched):
    assert cli.main(["lab", "--port", "70000"]) == 2
    assert "--port 70000" in capsys.readouterr().err
    assert launched == []


def test_lab_without_jupyterlab_says_what_to_install():
    done = run("-c", WITHOUT_JUPYTERLAB + "sys.exit(gemma_nb.cli.main(['lab']))")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        'gemma-nb: JupyterLab is not installed here: pip install "gemma_nb[app]"\n'
    )
