"""What is saved comes back whole; what is not whole is refused by name, and never half loaded."""

import dataclasses
import io
import json
import os
import random
import warnings
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy

import gemma_nb as gnb
from gemma_nb.chat import archive, journal, restore, store
from gemma_nb.chat.identity import Identity
from gemma_nb.errors import ConversationError, ConversationWarning, ModelMismatchError
from gemma_nb.text.template import RawTemplate, TranscriptTemplate

SAMPLING = gnb.Sampling(seed=1, max_new_tokens=8)


@pytest.fixture(scope="module")
def make(tiny_model):
    def make(**kwargs):
        kwargs = {"sampling": SAMPLING, "cache_length": 400, "template": "none", **kwargs}
        return gnb.ChatSession(*tiny_model, **kwargs)

    return make


@pytest.fixture(scope="module")
def grown(make):
    """A conversation with branches of every kind, one of them undone.  Not to be changed."""
    chat = make()
    chat.chat("Hello")
    chat.regenerate()
    chat.fork(2, with_token="x")
    chat.edit(chat.turns[0], "Hello there")
    chat.chat("More")
    chat.resume()
    chat.undo()
    return chat


@pytest.fixture
def saved(grown, tmp_path):
    return grown.save(tmp_path / "talk.gnb")


def assert_same_tree(tree, other):
    assert list(tree) == list(other)
    for one, same in zip(tree.nodes(), other.nodes(), strict=True):
        assert (one.id, one.active, one.undone) == (same.id, same.active, same.undone)


def assert_same(chat, other):
    assert_same_tree(chat.tree, other.tree)
    for name in ("system", "sampling", "capture", "cache_length", "when_full"):
        assert getattr(chat, name) == getattr(other, name)


def rewritten(path, **changes):
    """The file with some of the members of its conversation.json replaced, or left out (None)."""
    structure, evidence = archive.read(path)
    structure = {k: v for k, v in {**structure, **changes}.items() if v is not None}
    archive.write(path, structure, evidence.items())
    return path


# --- what comes back ------------------------------------------------------------------------------


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
        assert name in store.__doc__


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
            read = restore.read(saved)
        except ConversationError:
            refused += 1
        else:
            assert_same_tree(grown.tree, read.tree)
            assert read.settings == store.Settings.of(grown)
    assert refused > len(places) / 2


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


def test_missing_evidence_is_refused(saved, tiny_model):
    structure, evidence = archive.read(saved)
    archive.write(saved, structure, list(evidence.items())[1:])
    with pytest.raises(ConversationError, match=r"tokens"):
        gnb.ChatSession.load(saved, *tiny_model)


# --- other models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_model(tiny_model):
    model, _ = tiny_model
    return gnb.GemmaTransformer.from_config(model.config, key=jax.random.key(1))


def test_another_model_is_refused_and_the_ways_out_named(saved, other_model, tiny_model):
    with pytest.raises(ModelMismatchError, match=r"other weights.*recompute=True.*recompute=False"):
        gnb.ChatSession.load(saved, other_model, tiny_model[1])


def test_an_edited_model_is_another_one(saved, tiny_model):
    model, tokenizer = tiny_model
    edited = model.edit("layer_1/mlp/linear", lambda w: 0.9 * w)
    with pytest.raises(ModelMismatchError, match="other weights"):
        gnb.ChatSession.load(saved, edited, tokenizer)


def test_the_same_weights_are_the_same_model_wherever_they_are(tiny_model):
    model, tokenizer = tiny_model
    copied = model.replace(params=jax.tree.map(lambda x: x.copy(), model.params))
    assert Identity.of(copied, tokenizer) == Identity.of(model, tokenizer)
    assert Identity.of(model.place("auto"), tokenizer) == Identity.of(model, tokenizer)


def test_recomputed_evidence_is_that_of_the_new_model(grown, saved, other_model, tiny_model):
    tokenizer = tiny_model[1]
    reports = []
    loaded = gnb.ChatSession.load(
        saved, other_model, tokenizer, recompute=True, progress=lambda *r: reports.append(r)
    )
    assert len(reports) > 3
    assert [turn.text for turn in loaded.tree] == [turn.text for turn in grown.tree]
    run = jax.jit(other_model.transformer.apply)
    for turn, old in zip(loaded.tree, grown.tree, strict=True):
        if turn.role == "user":
            assert turn == old
            continue
        ids = loaded.tokens(turn)
        logits = run({"params": other_model.params}, np.array([ids + [0] * (100 - len(ids))]))
        expected = jax.nn.log_softmax(logits.logits[0])
        assert [r.token_id for r in turn.tokens] == [r.token_id for r in old.tokens]
        assert [r.text for r in turn.tokens] == [r.text for r in old.tokens]
        for record in turn.tokens:
            row = expected[record.position - 1]
            assert record.logprob == pytest.approx(float(row[record.token_id]), abs=2e-5)
            assert record.alternatives[0].token_id == int(row.argmax())
    # What is saved now is this model's.
    again = gnb.ChatSession.load(loaded.save(saved), other_model, tokenizer)
    assert_same(loaded, again)


def test_kept_evidence_stays_the_other_models(grown, saved, other_model, tiny_model):
    model, tokenizer = tiny_model
    loaded = gnb.ChatSession.load(saved, other_model, tokenizer, recompute=False)
    assert_same(grown, loaded)
    loaded.chat("Go on")
    path = loaded.save(saved)
    # Now it is neither's.
    for either in (model, other_model):
        with pytest.raises(ModelMismatchError, match="other weights"):
            gnb.ChatSession.load(path, either, tokenizer)
    gnb.ChatSession.load(path, model, tokenizer, recompute=True)


def test_another_tokenizer_spells_the_replies_anew(grown, saved, tiny_model, other_tokenizer):
    model, _ = tiny_model
    for keep in (None, False):
        with pytest.raises(ModelMismatchError, match="another tokenizer") as caught:
            gnb.ChatSession.load(saved, model, other_tokenizer, recompute=keep)
        assert "recompute=False" not in str(caught.value)
    loaded = gnb.ChatSession.load(saved, model, other_tokenizer, recompute=True)
    assert [turn.text for turn in loaded.tree] == [turn.text for turn in grown.tree]
    for turn in loaded.tree:
        if turn.role == "model":
            assert "".join(record.text for record in turn.tokens) == turn.text
            assert other_tokenizer.decode(turn.ids) == turn.text
            assert loaded.tokens(turn)[turn.tokens[0].position] == turn.tokens[0].token_id
    loaded.chat("Go on")


@pytest.fixture(scope="module")
def other_tokenizer(tiny_tokenizer):
    """The same pieces in another order."""
    from sentencepiece import sentencepiece_model_pb2

    from gemma_nb.text.tokenizer import Tokenizer

    proto = sentencepiece_model_pb2.ModelProto.FromString(tiny_tokenizer.model_proto)
    first, second = proto.pieces[-2].piece, proto.pieces[-1].piece
    proto.pieces[-2].piece, proto.pieces[-1].piece = second, first
    return Tokenizer.from_bytes(proto.SerializeToString())


# --- the journal beside it ------------------------------------------------------------------------


def test_a_journal_of_another_version_is_left_out_and_said_so(grown, saved, tiny_model):
    journal.Writer(journal.path_of(saved), store.new_id()).close()
    with pytest.warns(ConversationWarning, match="continues another version"):
        loaded = gnb.ChatSession.load(saved, *tiny_model)
    assert_same(grown, loaded)


def test_what_is_no_journal_is_named(saved, tiny_model):
    journal.path_of(saved).write_bytes(b"something else " * 20)
    with pytest.raises(ConversationError, match=r"journal is not the journal of a conversation"):
        gnb.ChatSession.load(saved, *tiny_model)


def test_a_journal_is_read_up_to_where_it_was_cut_off(tmp_path):
    path = tmp_path / "talk.gnb.journal"
    writer = journal.Writer(path, store.new_id())
    ends = [writer.size]
    for number in range(4):
        writer.append({"number": number}, {"7": b"x" * number})
        ends.append(writer.size)
    writer.close()
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
    writer = journal.Writer(path, store.new_id())
    writer.append({"number": 0}, {})
    first = writer.size
    writer.append({"number": 1}, {})
    writer.append({"number": 2}, {})
    writer.close()
    data = bytearray(path.read_bytes())
    data[first + 20] ^= 1
    path.write_bytes(data)
    read = journal.read(path)
    assert [changes["number"] for changes, _ in read.records] == [0]
    assert read.damaged == len(data) - first


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
    class Longer(store.Turn):
        rows: tuple[gnb.Capture, ...] = ()

    monkeypatch.setattr(store, "Turn", Longer)
    turn = Longer(id=1, role="model", text="x", rows=(gnb.Capture(3),))
    data, columns = store.encode_turn(turn, store.Tables())
    assert data["rows"] == {"rows": 1}
    assert columns["rows.top_k"].tolist() == [3]
    assert io.BytesIO(safetensors.numpy.save(columns)).getvalue()


def test_an_intervention_makes_another_model(saved, tiny_model):
    model, tokenizer = tiny_model
    first, second = (model.intervene(gnb.AblateHeads({0: [head]})) for head in (0, 1))
    with pytest.raises(ModelMismatchError, match="other weights"):
        gnb.ChatSession.load(saved, first, tokenizer)
    assert Identity.of(first, tokenizer) != Identity.of(second, tokenizer)
