"""The notebooks: clean in the repository, and telling the truth when they are run."""

from __future__ import annotations

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

import gemma_nb as gnb

REPO = Path(__file__).parents[2]
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
CHAT = REPO / "notebooks" / "01_chat.ipynb"


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_committed_clean(path):
    notebook = read(path)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}  # of no particular version
    for cell in notebook.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def execute(path: Path) -> dict[str, list[nbformat.NotebookNode]]:
    """Outputs of a notebook by cell id, run as a user's kernel would."""
    notebook = read(path)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,  # the first run converts the weights and compiles
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


@pytest.fixture(scope="module")
def executed() -> dict[str, list[nbformat.NotebookNode]]:
    """Outputs of 01_chat.ipynb."""
    return execute(CHAT)


def printed(outputs: list[nbformat.NotebookNode]) -> str:
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def shown(outputs: list[nbformat.NotebookNode]) -> nbformat.NotebookNode:
    """The data of the one thing a cell displays."""
    (data,) = [o.data for o in outputs if o.output_type in ("execute_result", "display_data")]
    return data


def complaints(outputs_of: dict[str, list[nbformat.NotebookNode]]) -> list[str]:
    """Cells with an exception, or anything on stderr but the progress of a first run."""
    return [
        name
        for name, outputs in outputs_of.items()
        for output in outputs
        if output.output_type == "error" or "Warning" in output.get("text", "")
    ]


@pytest.mark.real
def test_no_cell_complains(executed):
    assert complaints(executed) == []


@pytest.mark.real
def test_question_is_cut_into_tokens(executed):
    pieces = ["What", "▁is", "▁the", "▁capital", "▁of", "▁France", "?"]
    assert shown(executed["load"])["text/plain"] == repr(pieces)


@pytest.mark.real
def test_capital_of_france_is_paris(executed):
    assert printed(executed["chat"]) == "The capital of France is Paris.\n"


@pytest.mark.real
@pytest.mark.parametrize(("cell", "token"), [("table", "Paris"), ("stream", "<td>1</td>")])
def test_table_has_the_columns_that_the_prose_explains(executed, cell, token):
    table = shown(executed[cell])["text/html"]
    for column in ("token", "probability", "drawn with", "rank", "entropy", "alternatives"):
        assert f"<th>{column}</th>" in table
    assert token in table


@pytest.mark.real
def test_second_reply_streams(executed):
    reply = printed(executed["stream"])
    assert reply.strip()
    assert not re.search(r"User:|Assistant:", reply)


@pytest.mark.real
def test_head_shown_looks_at_france_where_paris_is_chosen(real_model):
    """What the prose says about the framed row of the picture."""
    model, tokenizer = real_model
    chat = gnb.ChatSession(model, tokenizer, sampling=gnb.Sampling(temperature=0))
    turn = chat.chat("What is the capital of France?")
    paris = next(token for token in turn.tokens if "Paris" in token.text)
    trace = chat.trace(turn)
    row = trace.attention.sel(layer=12, head=2).isel(query=paris.position - 1)
    looked_at = [label in (" France", " capital") for label in trace.labels]
    assert float(row.values[looked_at].sum()) > 0.5
    assert float(row.values.sum()) == pytest.approx(1, abs=1e-3)


@pytest.mark.real
def test_attention_is_drawn_once(executed):
    assert len(shown(executed["attention"])["image/png"]) > 10_000


@pytest.mark.real
def test_app_is_a_widget_and_readable_without_one(executed):
    app = shown(executed["app"])
    assert "model_id" in app["application/vnd.jupyter.widget-view+json"]
    assert "Paris" in app["text/html"]
