"""What is saved comes back whole."""

import dataclasses
import io
import json
import os
import zipfile

import numpy as np
import pytest
import safetensors.numpy

import gemma_nb as gnb
from gemma_nb.chat import saving
from gemma_nb.chat.saving import archive, journal, writer
from gemma_nb.chat.turns import Timing
from gemma_nb.errors import ConversationError
from gemma_nb.text.template import RawTemplate, TranscriptTemplate
from tests.chat.checks import assert_same


def test_everything_comes_back(grown, saved, tiny_model):
    loaded = gnb.ChatSession.load(saved, *tiny_model)
    assert_same(grown, loaded)
    assert loaded.turns == grown.turns


def test_a_loaded_conversation_goes_on_as_the_saved_one_would_have(make, tmp_path, tiny_model):
    chat = make()
    chat.chat("Hello")
    chat.chat("More")
    chat.undo()
    loaded = gnb.ChatSession.load(chat.save(tmp_path / "talk.gnb"), *tiny_model)
    assert loaded.redo() == chat.redo()
    one, same = chat.chat("And now?"), loaded.chat("And now?")
    assert (one.ids, one.text, one.id) == (same.ids, same.text, same.id)


def test_settings_come_back(make, tmp_path, tiny_model):
    chat = make(
        system="Be brief. " * 20,
        sampling=gnb.Sampling(temperature=0.5, top_k=3, stop=("\n", "!"), forbidden=range(9, 40)),
        capture=gnb.Capture(top_k=3),
        when_full="drop_oldest",
        template=TranscriptTemplate(labels=("Q", "A")),
    )
    chat.chat("Hello")
    loaded = gnb.ChatSession.load(chat.save(tmp_path / "talk.gnb"), *tiny_model)
    assert_same(chat, loaded)
    assert loaded.template == chat.template


def test_an_empty_conversation_can_be_saved(make, tmp_path, tiny_model):
    chat = make()
    assert_same(chat, gnb.ChatSession.load(chat.save(tmp_path / "empty"), *tiny_model))


def test_a_saved_file_is_a_zip_that_any_tool_reads(saved, grown):
    with zipfile.ZipFile(saved) as file:
        assert file.testzip() is None
        structure = json.loads(file.read("conversation.json"))
        reply = next(turn for turn in grown.tree if turn.role == "model")
        columns = safetensors.numpy.load(file.read(f"evidence/{reply.id}.safetensors"))
    assert (structure["format"], structure["version"]) == ("gemma_nb conversation", 1)
    assert structure["turns"]["1"]["text"] == "Hello"
    expected = [record.token_id for record in reply.tokens]
    np.testing.assert_array_equal(columns["tokens.token_id"], expected)
    assert columns["tokens.logprob"].dtype == np.float32


def test_the_documented_members_are_those_of_the_file(saved):
    structure, _ = archive.read(saved)
    for name in structure:
        assert name in saving.__doc__


def test_saving_replaces_a_file_and_leaves_nothing_else(make, saved, tiny_model):
    journal.path_of(saved).write_bytes(b"of what stood here before")
    chat = make()
    chat.chat("Something else")
    chat.save(saved)
    assert_same(chat, gnb.ChatSession.load(saved, *tiny_model))
    assert list(saved.parent.iterdir()) == [saved]


def test_a_relative_path_is_where_it_was_when_it_was_given(grown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert grown.save("talk.gnb") == tmp_path / "talk.gnb"


def test_a_template_of_ones_own_has_to_be_given(make, tmp_path, tiny_model):
    class Mine(RawTemplate):
        name = "mine"

    chat = make(template=Mine())
    chat.chat("Hello")
    path = chat.save(tmp_path / "talk.gnb")
    with pytest.raises(ConversationError, match=r"template of its own, .*Mine.*template="):
        gnb.ChatSession.load(path, *tiny_model)
    assert_same(chat, gnb.ChatSession.load(path, *tiny_model, template=Mine()))


def test_leftovers_of_killed_processes_are_removed_in_time(grown, tmp_path):
    old, new, other = (tmp_path / name for name in (".talk.gnb.0123456789ab.tmp", "n", "o"))
    new = tmp_path / ".talk.gnb.ba9876543210.tmp"
    other = tmp_path / ".other.gnb.0123456789ab.tmp"
    for file in (old, new, other):
        file.write_bytes(b"")
        os.utime(file, (0, 0))
    os.utime(new)
    grown.save(tmp_path / "talk.gnb")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([other.name, new.name, "talk.gnb"])


def test_evidence_of_the_future_is_kept(monkeypatch):
    """A field that is added to the records is stored without further ado."""

    @dataclasses.dataclass(frozen=True)
    class Longer(writer.Turn):
        rows: tuple[Timing, ...] = ()

    monkeypatch.setattr(writer, "Turn", Longer)
    turn = Longer(id=1, role="model", text="x", rows=(Timing(3),))
    data, columns = writer.encode_turn(turn, writer.Tables())
    assert data["rows"] == {"rows": 1}
    assert columns["rows.prompt_tokens"].tolist() == [3]
    assert io.BytesIO(safetensors.numpy.save(columns)).getvalue()
