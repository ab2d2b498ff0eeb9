"""The command itself: streams, exit codes, usage and help."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

import gemma_nb
from gemma_nb import cli
from tests.cli.fakes import run


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
