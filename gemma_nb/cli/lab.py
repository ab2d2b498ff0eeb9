"""`gemma-nb lab`: JupyterLab on the chat notebook."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from gemma_nb.cli.failure import UsageError

NOTEBOOK = "01_chat.ipynb"


def add_lab(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's."""
    lab = commands.add_parser(
        "lab",
        help="JupyterLab on the chat notebook",
        description=f"Opens notebooks/{NOTEBOOK} or {NOTEBOOK} of the current folder, which is "
        "written there first if there is none.",
    )
    lab.add_argument("--port", type=int, default=8888, help="the first port to try (%(default)s)")
    lab.add_argument("--no-browser", action="store_true", help="print the URL, open nothing")
    lab.set_defaults(run=_lab)


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
    package = Path(__file__).parents[1]
    # In a wheel the starter notebook lies inside the package, in a checkout beside it.
    homes = (package / "_notebooks", package.parent / "notebooks")
    starter = next(home / NOTEBOOK for home in homes if (home / NOTEBOOK).exists())
    shutil.copyfile(starter, NOTEBOOK)
    print(f"Wrote {NOTEBOOK}", file=sys.stderr)
    return Path(NOTEBOOK)
