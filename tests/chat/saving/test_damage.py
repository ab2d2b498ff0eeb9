"""What is not whole is refused by name, and never half loaded."""

import json
import math
import os
import random
import warnings
import zipfile

import pytest

import gemma_nb as gnb
from gemma_nb.chat.saving import archive, journal, protocol, reader, writer
from gemma_nb.errors import ConversationError, ConversationWarning
from tests.chat.checks import assert_same, assert_same_tree, rewritten

# How many bad values are tried: 2,000 show it, a few guard it.
BAD_VALUES = int(os.environ.get("GEMMA_NB_BAD_VALUES", "120"))

# --- what is refused ------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path, tiny_model):
    with pytest.raises(ConversationError, match=r"no file .*nowhere\.gnb.*chat\.save"):
        gnb.ChatSession.load(tmp_path / "nowhere.gnb", *tiny_model)
    with pytest.raises(ConversationError, match="cannot be read"):
        gnb.ChatSession.load(tmp_path, *tiny_model)


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(grown, saved, monkeypatch):
    before = saved.read_bytes()
    with pytest.raises(ConversationError, match=r"nowhere.*No such file.*still in memory"):
        grown.save(saved.parent / "nowhere" / "talk.gnb")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConversationError, match="No space left on device"):
        grown.save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("size", [0, 1, 21, 22, 100, 1000, -1, -22, -50])
def test_truncated_files_are_refused(saved, tiny_model, size):
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(ConversationError, match=r"talk\.gnb is not a whole conversation"):
        gnb.ChatSession.load(saved, *tiny_model)


def test_a_changed_byte_is_noticed_or_changes_nothing(grown, saved):
    """Wherever it is: an error with the file's name, or the same conversation."""
    whole = saved.read_bytes()
    draw = random.Random(0)
    end = len(whole)
    places = [*range(end - 22, end), *draw.sample(range(end), 150)]
    refused = 0
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        saved.write_bytes(changed)
        try:
            read = reader.read(saved)
        except ConversationError:
            refused += 1
        else:
            assert_same_tree(grown.tree, read.tree)
            assert read.settings == protocol.Settings.of(grown)
    assert refused > len(places) / 2


_VALUES = (-1, 0, 7, 10**30, 2**63, 0.5, math.inf, math.nan, "x", "\ud800", None, True, [], [1])
_OBJECTS = ({}, {"x": 1}, {"list": 99}, {"list": -1}, {"string": 0}, {"string": 10**9})


def places_in(data, at=()):
    """The keys that lead to every value of a JSON file, but not to the later ones of long lists."""
    if at:
        yield at
    items = data.items() if isinstance(data, dict) else enumerate(data[:3])
    for key, value in items:
        yield from places_in(value, (*at, key)) if isinstance(value, dict | list) else [(*at, key)]


def with_value(structure, at, value):
    """A copy in which something else stands in one place."""
    changed = json.loads(json.dumps(structure))
    inner = changed
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return changed


def write_raw(path, structure, evidence):
    """Also what `archive.write` would not write, such as NaN."""
    members = [("conversation.json", json.dumps(structure))]
    zip_of(path, members + [(f"evidence/{i}.safetensors", data) for i, data in evidence.items()])


def assert_refused_or_of_use(path, tiny_model, what):
    """A ConversationError that names the file, or a conversation that goes on and is saved."""
    try:
        chat = gnb.ChatSession.load(path, *tiny_model, recompute=False)
    except ConversationError as error:
        return path.name in str(error)
    except BaseException as error:
        error.add_note(what)
        raise
    for turn in chat.tree:
        assert repr(turn)
        assert chat.tokens(turn) is not None, what
        assert turn.timing.tokens_per_second >= 0
    assert chat.context.warning is not None
    reader.read(chat.save(path.with_name("again.gnb")))
    return False


def test_a_bad_value_anywhere_is_refused_by_name(saved, tiny_model):
    structure, evidence = archive.read(saved)
    places = list(places_in(structure))
    draw, refused = random.Random(2), 0
    for number in range(BAD_VALUES):
        at, value = draw.choice(places), draw.choice([*_VALUES, *_OBJECTS])
        write_raw(saved, with_value(structure, at, value), evidence)
        refused += assert_refused_or_of_use(saved, tiny_model, f"{number}: {at} is {value!r}")
    assert refused > BAD_VALUES / 2


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("settings", "cache_length"), -5),
        (("settings", "cache_length"), 2**70),
        (("settings", "system"), "\ud800"),
        (("turns", "1", "text"), "\ud800"),
        (("turns", "2", "context", "dropped"), 1),
        (("turns", "2", "context", "dropped"), -2),
        (("turns", "2", "context", "used"), -1),
        (("turns", "2", "context", "system"), "\ud800"),
        (("turns", "2", "timing", "prefill_seconds"), math.nan),
        (("turns", "2", "timing", "new_tokens"), -1),
        (("turns", "3", "origin", "index"), -1),
    ],
)
def test_what_no_session_writes_is_refused_by_name(saved, tiny_model, at, value):
    structure, evidence = archive.read(saved)
    write_raw(saved, with_value(structure, at, value), evidence)
    with pytest.raises(ConversationError, match=rf"talk\.gnb is not a whole .*({at[-1]}|{at[-2]})"):
        gnb.ChatSession.load(saved, *tiny_model)


def test_any_bytes_are_refused(saved, tiny_model):
    draw = random.Random(1)
    for size in (0, 10, 100, 1000):
        saved.write_bytes(b"PK\x03\x04" + draw.randbytes(size))
        with pytest.raises(ConversationError):
            gnb.ChatSession.load(saved, *tiny_model)


def zip_of(path, members, compression=zipfile.ZIP_STORED):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as file:
        warnings.simplefilter("ignore")  # zipfile's own, of two members of a name
        for name, data in members:
            file.writestr(name, data)
    return path


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("other.json", "{}")], r"no conversation\.json"),
        ([("conversation.json", "{}"), ("../evil", "x")], r"member '\.\./evil'"),
        ([("conversation.json", "{}"), ("/etc/passwd", "x")], "member '/etc/passwd'"),
        ([("conversation.json", "{}"), ("evidence/../1.safetensors", "")], "which no conversation"),
        ([("conversation.json", "{}"), ("evidence/01.safetensors", "")], "which no conversation"),
        (
            [("conversation.json", "{}"), ("conversation.json", "{}")],
            "two members of the same name",
        ),
        ([("conversation.json", "[]")], "not an object"),
        ([("conversation.json", "{")], "not a whole conversation"),
        ([("conversation.json", b"\xff\xfe{")], "not a whole conversation"),
        ([("conversation.json", "[" * 100_000)], "not a whole conversation"),
        ([("conversation.json", "{}")], "expected format 'gemma_nb conversation'"),
    ],
)
def test_zips_of_something_else_are_refused(tmp_path, tiny_model, members, message):
    path = zip_of(tmp_path / "talk.gnb", members)
    with pytest.raises(ConversationError, match=message):
        gnb.ChatSession.load(path, *tiny_model)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, tiny_model):
    bomb = [("conversation.json", b" " * (1 << 26))]
    path = zip_of(tmp_path / "talk.gnb", bomb, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 17
    with pytest.raises(ConversationError, match="is compressed"):
        gnb.ChatSession.load(path, *tiny_model)


def test_sizes_are_checked_before_reading(tmp_path, tiny_model):
    """Members that share their bytes, or declare more than there are."""
    path = zip_of(tmp_path / "talk.gnb", [("conversation.json", "{}" + " " * 5000)])
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    for offset in (20, 24):  # compressed and uncompressed size in the central directory
        data[at + offset : at + offset + 4] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ConversationError, match="declare 1,073,741,824 bytes"):
        gnb.ChatSession.load(path, *tiny_model)


def test_a_huge_tensor_is_refused(saved, tiny_model):
    """safetensors checks what a header declares against the bytes that are there."""
    structure, evidence = archive.read(saved)
    header = json.dumps(
        {"tokens.token_id": {"dtype": "I64", "shape": [1 << 40], "data_offsets": [0, 1 << 43]}}
    ).encode()
    id_ = next(iter(evidence))
    archive.write(saved, structure, [(id_, len(header).to_bytes(8, "little") + header)])
    with pytest.raises(ConversationError, match="not a whole conversation"):
        gnb.ChatSession.load(saved, *tiny_model)


def test_a_later_version_says_to_update(saved, tiny_model):
    rewritten(saved, version=2, written_by="gemma_nb 9.0")
    with pytest.raises(ConversationError, match=r"version 2 .*gemma_nb 9\.0.*Update"):
        gnb.ChatSession.load(saved, *tiny_model)


@pytest.mark.parametrize(
    "changes",
    [
        {"nodes": {"0": {"children": [1], "active": 0}}},
        {"nodes": {"0": {"children": [0], "active": None}}},
        {"nodes": {"0": {"children": [], "active": 4}}, "turns": {}},
        {"nodes": {"0": {"children": [], "size": 4}}, "turns": {}},
        {"nodes": []},
        {"turns": {}},
        {"turns": None},
        {"turns": {"one": {}}},
        {"strings": []},
        {"strings": [3]},
        {"lists": [["a"]]},
        {"settings": {}},
        {"identity": {"name": 3}},
        {"conversation": "../../etc"},
        {"generation": 7},
        {"format": "another"},
        {"version": "1"},
    ],
)
def test_a_structure_that_contradicts_itself_is_refused(saved, tiny_model, changes):
    rewritten(saved, **changes)
    with pytest.raises(ConversationError, match=r"talk\.gnb"):
        gnb.ChatSession.load(saved, *tiny_model)


@pytest.mark.parametrize("token", [-1, 2**20, 2**31, 10**30])
def test_token_ids_that_there_are_none_of_are_refused(saved, tiny_model, token):
    structure, _ = archive.read(saved)
    turn = next(data for data in structure["turns"].values() if data["role"] == "model")
    turn["ids"] = [5, token]
    rewritten(saved, turns=structure["turns"])
    with pytest.raises(ConversationError, match=f"turn {turn['id']} has token ids outside of 0 to"):
        gnb.ChatSession.load(saved, *tiny_model)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no such pipes here")
def test_a_pipe_is_not_waited_for(saved, tmp_path, tiny_model):
    pipe = tmp_path / "pipe.gnb"
    os.mkfifo(pipe)
    with pytest.raises(ConversationError, match="no regular file"):
        gnb.ChatSession.load(pipe, *tiny_model)
    with pytest.raises(ConversationError, match="no regular file"):
        gnb.ChatSession.from_messages(*tiny_model, pipe)
    os.mkfifo(f"{saved}.journal")
    with pytest.raises(ConversationError, match=r"journal cannot be read: it is no regular file"):
        gnb.ChatSession.load(saved, *tiny_model)


def test_missing_evidence_is_refused(saved, tiny_model):
    structure, evidence = archive.read(saved)
    archive.write(saved, structure, list(evidence.items())[1:])
    with pytest.raises(ConversationError, match=r"tokens"):
        gnb.ChatSession.load(saved, *tiny_model)


# --- the journal beside it ------------------------------------------------------------------------


def test_a_journal_of_another_version_is_left_out_and_said_so(grown, saved, tiny_model):
    journal.Writer(journal.path_of(saved), writer.new_id()).close()
    with pytest.warns(ConversationWarning, match="continues another version"):
        loaded = gnb.ChatSession.load(saved, *tiny_model)
    assert_same(grown, loaded)


def test_what_is_no_journal_is_named(saved, tiny_model):
    journal.path_of(saved).write_bytes(b"something else " * 20)
    with pytest.raises(ConversationError, match=r"journal is not the journal of a conversation"):
        gnb.ChatSession.load(saved, *tiny_model)


def test_a_journal_is_read_up_to_where_it_was_cut_off(tmp_path):
    path = tmp_path / "talk.gnb.journal"
    appender = journal.Writer(path, writer.new_id())
    ends = [appender.size]
    for number in range(4):
        appender.append({"number": number}, {"7": b"x" * number})
        ends.append(appender.size)
    appender.close()
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        read = journal.read(path)
        count = sum(end <= size for end in ends) - 1
        assert (read is None) == (count < 0)
        if read is not None:
            assert read.damaged == 0
            assert [changes["number"] for changes, _ in read.records] == list(range(count))
            assert [blobs["7"] for _, blobs in read.records] == [b"x" * n for n in range(count)]


def test_a_damaged_journal_is_read_up_to_the_damage(tmp_path):
    path = tmp_path / "talk.gnb.journal"
    appender = journal.Writer(path, writer.new_id())
    appender.append({"number": 0}, {})
    first = appender.size
    appender.append({"number": 1}, {})
    appender.append({"number": 2}, {})
    appender.close()
    data = bytearray(path.read_bytes())
    data[first + 20] ^= 1
    path.write_bytes(data)
    read = journal.read(path)
    assert [changes["number"] for changes, _ in read.records] == [0]
    assert read.damaged == len(data) - first
