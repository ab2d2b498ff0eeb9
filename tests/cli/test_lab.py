"""`gemma-nb lab`: the notebook that it opens, and how."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

import pytest

from gemma_nb import cli
from tests.cli.fakes import REPO, run

WITHOUT_JUPYTERLAB = "import sys; sys.modules['jupyterlab.labapp'] = None; import gemma_nb.cli; "


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
