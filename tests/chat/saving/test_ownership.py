"""Files of others where a session saves stay, and what is lost there is written again."""

import os

import pytest

from gemma_nb.chat.saving import journal
from gemma_nb.errors import ConversationError, ConversationWarning
from tests.chat.saving.autosaved import assert_saved, flush


def test_another_conversation_is_never_replaced(begin, tmp_path, by_hand):
    path = tmp_path / "talk.gnb"
    first = begin()
    first.chat("Hello")
    first.save(path)
    before = path.read_bytes()
    with pytest.raises(ConversationError, match=r"exists already.*autosave=True"):
        begin(autosave=path)
    second = begin()
    with pytest.raises(ConversationError, match="exists already"):
        second.autosave = path
    assert second.autosave is None
    assert path.read_bytes() == before
    # Its own it may go on with.
    first.autosave = path
    first.chat("More")
    flush(first)
    assert_saved(first, path)
    path.with_name("x").write_text("anything")
    with pytest.raises(ConversationError, match="exists already"):
        first.autosave = path.with_name("x")
    assert first.autosave == path


# --- others write there, too ----------------------------------------------------------------------


def restore_older(path, older):
    path.write_bytes(older)


def replace_by_notes(path, older):
    path.with_name("notes").write_bytes(b"somebody else's notes")
    os.replace(path.with_name("notes"), path)


def put_a_folder_there(path, older):
    path.unlink()
    path.mkdir()


def replace_the_journal(path, older):
    journal.path_of(path).unlink()
    journal.path_of(path).write_bytes(b"somebody else's journal")


def foreign(path):
    """The bytes that others have put there."""
    files = (path, journal.path_of(path))
    return [file.read_bytes() if file.is_file() else file.is_dir() for file in files]


@pytest.mark.parametrize(
    "happens", [restore_older, replace_by_notes, put_a_folder_there, replace_the_journal]
)
@pytest.mark.parametrize("end", ["goes on", "ends at once"])
def test_what_others_put_there_stays(begin, tmp_path, by_hand, happens, end):
    path = tmp_path / "talk.gnb"
    chat = begin(autosave=path)
    chat.chat("one")
    chat.save(path)
    older = path.read_bytes()
    chat.chat("two")
    chat.save(path)
    chat.chat("three")
    flush(chat)
    happens(path, older)
    before = foreign(path)
    if end == "goes on":
        flush(chat)
        with pytest.warns(ConversationWarning, match=r"something else.*saved to .*talk-2.gnb"):
            chat.chat("four")
        flush(chat)
        assert_saved(chat, tmp_path / "talk-2.gnb")
        chat.autosave = None
    else:
        with pytest.warns(ConversationWarning, match=r"something else.*saved to .*talk-2.gnb"):
            chat.autosave = None
    assert_saved(chat, tmp_path / "talk-2.gnb")
    kept = foreign(path)
    assert kept[0] == before[0]
    assert happens is not replace_the_journal or kept[1] == before[1]
    names = {file.name for file in tmp_path.iterdir()} - {"talk.gnb.journal"}
    assert names == {"talk.gnb", "talk-2.gnb"}


def delete_the_file(path):
    path.unlink()


def delete_the_journal(path):
    journal.path_of(path).unlink()


def delete_both(path):
    path.unlink()
    journal.path_of(path).unlink()


def cut_the_journal_off(path):
    with open(journal.path_of(path), "r+b") as file:
        file.truncate(80)


def copy_the_same_back(path):
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    journal.path_of(path).unlink()


@pytest.mark.parametrize(
    "happens",
    [delete_the_file, delete_the_journal, delete_both, cut_the_journal_off, copy_the_same_back],
)
def test_what_is_lost_is_written_again(begin, tmp_path, by_hand, happens):
    path = tmp_path / "talk.gnb"
    chat = begin(autosave=path)
    chat.chat("one")
    flush(chat)
    happens(path)
    flush(chat)
    assert_saved(chat, path)
    with pytest.warns(ConversationWarning, match="written there again"):
        chat.chat("two")
    happens(path)
    with pytest.warns(ConversationWarning, match="written there again"):
        chat.autosave = None
    assert_saved(chat, path)
    assert list(tmp_path.iterdir()) == [path]
