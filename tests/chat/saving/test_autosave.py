"""What is said is on the disk within a second, and whatever is on the disk loads."""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import gemma_nb as gnb
from gemma_nb.chat.saving import archive, autosave, journal, reader
from gemma_nb.errors import ConversationError, ConversationWarning
from gemma_nb.text.tokenizer import Tokenizer
from tests.chat.saving.autosaved import SAMPLING, assert_saved, flush
from tests.chat.saving.autosaving import model_for

REPO = Path(__file__).parents[3]
# How often a session is killed; 50 shows it, a few guard it.
KILLS = int(os.environ.get("GEMMA_NB_KILLS", "2"))


def test_every_operation_is_saved(begin, tmp_path, by_hand):
    path = tmp_path / "talk.gnb"
    chat = begin(autosave=path)
    assert chat.autosave == path
    assert_saved(chat, path)
    steps = [
        lambda: chat.chat("Hello"),
        lambda: chat.regenerate(),
        lambda: chat.fork(2, with_token="x"),
        lambda: chat.edit(chat.turns[0], "Hi"),
        lambda: chat.undo(),
        lambda: chat.redo(),
        lambda: setattr(chat, "sampling", gnb.Sampling(temperature=0, max_new_tokens=4)),
        lambda: setattr(chat, "system", "Be brief."),
        lambda: chat.resume(),
        lambda: chat.new_conversation(),
        lambda: chat.chat("Again"),
    ]
    for step in steps:
        step()
        flush(chat)
        assert_saved(chat, path)
    # All of it went to the journal, and ends in the file.
    assert journal.path_of(path).stat().st_size > 1000
    chat.autosave = None
    assert list(tmp_path.iterdir()) == [path]
    assert_saved(chat, path)


def test_nothing_is_written_when_nothing_changed(begin, tmp_path, by_hand):
    chat = begin(autosave=tmp_path / "talk.gnb")
    chat.chat("Hello")
    flush(chat)
    beside = journal.path_of(tmp_path / "talk.gnb")
    before = beside.stat()
    flush(chat)
    assert beside.stat() == before


def test_a_reply_in_the_making_is_saved(begin, tmp_path, tiny_model, by_hand):
    path = tmp_path / "talk.gnb"
    chat = begin(autosave=path, sampling=gnb.Sampling(seed=1, max_new_tokens=30))
    stream = chat.stream("Hello")
    shown = []
    for count in (3, 5, 9):
        shown += [next(stream) for _ in range(count)]
        flush(chat)
        saved = reader.read(path)
        assert saved.recovered
        reply = saved.tree.turns[-1]
        assert reply.finish_reason == "interrupted"
        assert reply.tokens == chat.partial.tokens
        assert reply.text == chat.partial.text
        assert len(reply.tokens) >= len(shown)
        assert reply.ids == tuple(record.token_id for record in reply.tokens)
    copy = tmp_path / "copy.gnb"
    for file in (path, journal.path_of(path)):
        copy.with_name(file.name.replace("talk", "copy")).write_bytes(file.read_bytes())
    rest = list(stream)
    flush(chat)
    saved = reader.read(path)
    assert not saved.recovered
    assert saved.tree.turns == chat.turns
    # What was broken off goes on as it would have.
    recovered = gnb.ChatSession.load(copy, *tiny_model)
    resumed = recovered.resume()
    assert resumed.ids[: len(chat.turns[-1].ids)] == chat.turns[-1].ids
    assert rest


def test_a_message_without_a_reply_gets_an_empty_one(begin, tmp_path, tiny_model, by_hand):
    """The kernel died before the first token: the conversation goes on all the same."""
    path = tmp_path / "talk.gnb"
    chat = begin(autosave=path)
    stream = chat.stream("Hello")
    next(stream)
    chat.keeper._autosave._encoder._partial = (chat.making[1].id, 99)  # as if there were none yet
    flush(chat)
    loaded = gnb.ChatSession.load(path, *tiny_model)
    user, reply = loaded.turns
    assert (user.text, reply.text, reply.finish_reason) == ("Hello", "", "interrupted")
    loaded.chat("And now?")
    assert loaded.resume(reply).tokens
    # Of a reply beside another one, nothing may be there yet.
    list(stream)
    again = chat.stream_regenerate()
    next(again)
    chat.keeper._autosave._encoder._partial = (chat.making[1].id, 99)
    flush(chat)
    loaded = gnb.ChatSession.load(path, *tiny_model)
    assert [turn.role for turn in loaded.turns] == ["user", "model"]
    loaded.chat("And now?")
    list(again)


def test_the_thread_saves_within_a_second(begin, tmp_path):
    path = tmp_path / "talk.gnb"
    chat = begin(autosave=path)
    turn = chat.chat("Hello")
    deadline = time.monotonic() + 30
    while turn not in list(reader.read(path).tree):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert autosave.INTERVAL < 1


def test_a_session_that_is_dropped_is_saved(begin, tiny_model, tmp_path, by_hand):
    path = tmp_path / "talk.gnb"
    chat = gnb.ChatSession(*tiny_model, template="none", sampling=SAMPLING, autosave=path)
    chat.chat("Hello")
    flush(chat)
    turns = chat.turns
    del chat
    assert list(tmp_path.iterdir()) == [path]
    assert reader.read(path).tree.turns == turns


def test_loading_goes_on_with_the_same_file(begin, tmp_path, tiny_model, by_hand):
    path = tmp_path / "talk.gnb"
    chat = begin(autosave=path)
    chat.chat("Hello")
    flush(chat)
    second = gnb.ChatSession.load(path, *tiny_model, autosave=True)
    assert second.turns == chat.turns
    second.chat("More")
    flush(second)
    assert_saved(second, path)
    # The first session notices that the file is another's now, and writes nothing.
    flush(chat)
    assert list(tmp_path.glob("*.gnb")) == [path]
    # What it has more goes elsewhere, and that is said.
    chat.chat("Lost?")
    flush(chat)
    assert_saved(second, path)
    assert chat.autosave == tmp_path / "talk-2.gnb"
    assert_saved(chat, chat.autosave)
    with pytest.warns(ConversationWarning, match=r"another session goes on.*saved to .*talk-2.gnb"):
        chat.chat("Really?")
    flush(chat)
    assert_saved(chat, chat.autosave)
    chat.autosave = tmp_path / "other.gnb"
    assert_saved(chat, tmp_path / "other.gnb")
    second.autosave = None


def test_bytes_that_changed_in_place_are_not_folded(begin, tmp_path, by_hand):
    path = tmp_path / "talk.gnb"
    chat = begin(autosave=path)
    chat.chat("one")
    flush(chat)
    size = journal.path_of(path).stat().st_size
    with open(journal.path_of(path), "r+b") as file:
        file.seek(size // 2)
        file.write(b"x" * 100)
    chat.autosave = None
    assert_saved(chat, path)


def test_a_folder_that_is_gone_is_told_and_the_end_saves_elsewhere(
    begin, tmp_path, by_hand, monkeypatch
):
    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    folder = tmp_path / "folder"
    folder.mkdir()
    chat = begin(autosave=folder / "talk.gnb")
    chat.chat("one")
    shutil.rmtree(folder)
    flush(chat)
    with pytest.warns(ConversationWarning, match="cannot be written.*still in memory"):
        chat.chat("two")
    with pytest.warns(ConversationWarning, match=r"saved to .*spare.* instead"):
        chat.autosave = None
    (saved,) = spare.iterdir()
    assert_saved(chat, saved)


def test_what_a_link_leads_to_is_replaced_and_the_link_stays(begin, tmp_path, tiny_model, by_hand):
    file, link = tmp_path / "elsewhere.gnb", tmp_path / "talk.gnb"
    link.symlink_to(file)
    chat = begin(autosave=link)
    chat.chat("one")
    flush(chat)
    assert link.is_symlink()
    for path in (link, file):
        assert_saved(chat, path)
    chat.autosave = None
    assert link.is_symlink()
    assert {each.name for each in tmp_path.iterdir()} == {"elsewhere.gnb", "talk.gnb"}


def test_a_journal_whose_file_is_gone_is_kept(begin, tmp_path, by_hand):
    path = tmp_path / "talk.gnb"
    journal.path_of(path).write_bytes(b"of a file that may come back")
    chat = begin(autosave=path)
    chat.chat("one")
    chat.autosave = None
    kept = tmp_path / "talk.gnb.journal.left-out"
    assert kept.read_bytes() == b"of a file that may come back"
    assert_saved(chat, path)


def test_saving_by_hand_folds_the_journal(begin, tmp_path, by_hand):
    path = tmp_path / "talk.gnb"
    chat = begin(autosave=path)
    chat.chat("Hello")
    assert chat.save(path) == path
    alone = tmp_path / "copy.gnb"
    alone.write_bytes(path.read_bytes())
    assert_saved(chat, alone)


def test_a_journal_that_has_grown_is_folded(begin, tmp_path, by_hand, monkeypatch):
    monkeypatch.setattr(autosave, "_FOLD_FROM", 4000)
    path = tmp_path / "talk.gnb"
    chat = begin(autosave=path)
    sizes = []
    for number in range(12):
        chat.chat(f"Hello {number}")
        flush(chat)
        assert_saved(chat, path)
        sizes.append(journal.path_of(path).stat().st_size)
    assert min(sizes[1:]) < 100 < max(sizes)
    structure, evidence = archive.read(path)
    assert len(evidence) > 6
    assert structure["previous"] is not None


def test_a_crash_between_file_and_journal_loses_nothing(begin, tmp_path, by_hand, monkeypatch):
    path = tmp_path / "talk.gnb"
    chat = begin(autosave=path)
    chat.chat("Hello")
    flush(chat)
    beside = journal.path_of(path)
    before = beside.read_bytes()
    chat.save(path)
    beside.write_bytes(before)  # the file is new, the journal still the old one
    assert_saved(chat, path)
    with pytest.warns(ConversationWarning, match="changed by somebody else"):
        chat.autosave = None


def test_a_full_disk_is_told_and_overcome(begin, tmp_path, by_hand, monkeypatch):
    path = tmp_path / "talk.gnb"
    chat = begin(autosave=path)
    chat.chat("Hello")
    flush(chat)
    held, whole = set(chat.tree), os.fsync

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    chat.chat("More")
    flush(chat)
    assert held <= set(reader.read(path).tree)
    with pytest.warns(ConversationWarning, match="No space left on device"):
        chat.chat("Still there?")
    chat.chat("Told only once")
    monkeypatch.setattr(os, "fsync", whole)
    monkeypatch.setattr(chat.keeper._autosave, "_retry_at", 0)
    flush(chat)
    assert_saved(chat, path)


def test_nothing_ends_the_thread(begin, tmp_path, by_hand, monkeypatch):
    """Also what nobody thought of is told, and tried again."""
    chat = begin(autosave=tmp_path / "talk.gnb")
    with monkeypatch.context() as patch:
        patch.setattr(autosave, "_partial_of", lambda chat: 1 / 0)
        flush(chat)
    with pytest.warns(ConversationWarning, match="division by zero"):
        chat.chat("Hello")
    monkeypatch.setattr(chat.keeper._autosave, "_retry_at", 0)
    flush(chat)
    assert_saved(chat, tmp_path / "talk.gnb")


def test_a_file_that_cannot_be_begun_is_refused(begin, tmp_path):
    with pytest.raises(ConversationError, match="cannot be written"):
        begin(autosave=tmp_path / "nowhere" / "talk.gnb")


def test_a_tree_that_grows_meanwhile_is_saved_whole(begin, tmp_path, by_hand):
    """The thread looks while another one talks; what it writes loads at any time."""
    path = tmp_path / "talk.gnb"
    chat = begin(autosave=path, sampling=gnb.Sampling(max_new_tokens=2))
    done = threading.Event()

    def talk():
        for number in range(40):
            chat.chat(f"{number}")
            if number % 3 == 0:
                chat.undo()
        done.set()

    thread = threading.Thread(target=talk)
    thread.start()
    while not done.is_set():
        flush(chat)
        reader.read(path)
    thread.join()
    flush(chat)
    assert_saved(chat, path)


# --- kill -9 --------------------------------------------------------------------------------------


def start(path, tokenizer_file, seed, folder):
    log = open(folder / f"{seed}.log", "w+b")  # noqa: SIM115
    # XLA warns on stderr where it compiles slowly, as on a busy machine.
    with (folder / f"{seed}.errors").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.chat.saving.autosaving", path, tokenizer_file, str(seed)],
            cwd=REPO,
            stdout=log,
            stderr=errors,
        )
    return process, log


def said(log):
    """(time, turn, tokens) of what the session told that it had."""
    log.seek(0)
    lines = log.read().decode().splitlines(keepends=True)
    assert lines, f"the session did not start: {Path(log.name).with_suffix('.errors').read_text()}"
    assert lines[0].strip() == "ready", "".join(lines)
    whole = [line.split() for line in lines[1:] if line.endswith("\n")]
    return [(float(when), int(turn), int(tokens)) for when, turn, tokens in whole]


def test_kill_9_at_random_moments(tiny_tokenizer, tmp_path):
    """Every file left behind loads, and has all but the last second."""
    folder = tmp_path / "files"
    folder.mkdir()
    path = folder / "talk.gnb"
    tokenizer_file = tiny_tokenizer.save_model(tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.from_file(tokenizer_file)
    model = model_for(tokenizer)
    draw = random.Random(0)
    turns_before = 0
    for seed in range(KILLS):
        process, log = start(path, tokenizer_file, seed, tmp_path)
        with log:
            while process.poll() is None and os.fstat(log.fileno()).st_size == 0:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 4))
            killed = time.time()
            process.kill()
            process.wait()
            told = said(log)
        loaded = gnb.ChatSession.load(path, model, tokenizer)
        turns = {turn.id: turn for turn in loaded.tree}
        assert len(turns) >= turns_before
        turns_before = len(turns)
        for when, turn, tokens in told:
            if when < killed - 1:
                assert turn in turns, f"turn {turn} of {killed - when:.2f} s before is not there"
                assert len(turns[turn].tokens) >= tokens, f"{killed - when:.2f} s before"
        for turn in turns.values():
            if turn.role == "model":
                assert "".join(record.text for record in turn.tokens) == turn.text
        leftover = {file.name for file in folder.iterdir() if not file.name.endswith(".tmp")}
        assert leftover <= {"talk.gnb", "talk.gnb.journal"}
    loaded = gnb.ChatSession.load(path, model, tokenizer)
    loaded.sampling = SAMPLING
    assert loaded.chat("Still here?").tokens
