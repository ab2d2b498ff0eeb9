"""Tokenizer files of Hugging Face folders, against the tokenizers library."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_nb.errors import CheckpointError
from gemma_nb.text.detokenizer import StreamingDetokenizer
from tests.checkpoints import tiny
from tests.text.conftest import texts
from tests.text.hugging_face import (
    PIECES,
    REPLACE,
    SIZE,
    Reference,
    added,
    decoder,
    read,
    tokenizer_json,
)

METASPACE = {
    "type": "Metaspace",
    "replacement": "\u2581",
    "prepend_scheme": "never",
    "split": False,
}
TAKING = [
    added("<x>", SIZE, lstrip=True, rstrip=True),
    added("he", PIECES.index("he"), single_word=True),
    added("th ", SIZE + 1, normalized=True),
    added("hh", SIZE + 2, normalized=True, rstrip=True),
]
# Nothing joins "t" and "h", but SentencePiece would, as long as there is "th".
UNWRITABLE = [("h", "e"), ("\u2581", "\u2581")]
WRITABLE = {
    "as transformers writes it": {},
    "merges as texts": {"merges": ["t h", "\u2581 th", "\u2581th e", "h e", "\u2581 \u2581"]},
    "no pre-tokenizer": {"pre_tokenizer": None},
    "steps": {"normalizer": {"type": "Sequence", "normalizers": [REPLACE]}},
    "Metaspace": {"normalizer": None, "pre_tokenizer": METASPACE},
    "added text": {"more": [added("<|x|>", SIZE), added("t t", SIZE + 1, normalized=True)]},
    "added text inside pieces": {"more": [added("h", PIECES.index("h"))]},
}
OTHERS = {
    "added text that takes spaces along": {"more": TAKING},
    "added text that is found in two searches": {
        "more": [added("hh", SIZE), added("ehh", SIZE + 1, normalized=True)]
    },
    "added text spelled as a piece": {"more": [added(" the", SIZE)]},
    "merges that are no scores": {"merges": UNWRITABLE},
}


def assert_same(tokenizer, reference, text):
    assert tokenizer.encode(text) == reference(text), text


@pytest.fixture(scope="module", params=[*WRITABLE, *OTHERS])
def both(request):
    """A tokenizer.json as we read it, and as the library does."""
    fields = tokenizer_json(**{**WRITABLE, **OTHERS}[request.param])
    return read(json=fields), Reference(fields)


@settings(max_examples=40)
@given(
    text=st.one_of(
        texts,
        st.text("the \n\t", max_size=20),
        st.lists(st.sampled_from(["<x>", "he", "th ", "hh", "<|x|>", " the", "t t", " "])).map(
            "".join
        ),
    )
)
def test_ids_are_those_of_the_tokenizers_library(both, text):
    assert_same(*both, text)


def test_texts_that_are_one_piece_may_be_looked_up_first():
    """But for control and byte pieces, which the library then takes from texts that spell them."""
    fields = tokenizer_json(ignore_merges=True)
    tokenizer, reference = read(json=fields), Reference(fields)
    for text in ("the", " the", "he", "th\n the", "hth", ""):
        assert_same(tokenizer, reference, text)
    assert len(tokenizer.encode("<bos>")) == 5
    with pytest.raises(
        CheckpointError, match=r"model\.ignore_merges with pieces that no merges make"
    ):
        read(json=tokenizer_json(ignore_merges=True, merges=UNWRITABLE))


@pytest.mark.parametrize("name", WRITABLE)
def test_sentencepiece_gives_the_same_ids_from_a_saved_model(name, tmp_path):
    ours = read(json=tokenizer_json(**WRITABLE[name]))
    path = ours.save_model(tmp_path / "tokenizer.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in ("the  <b>\n\nthe ünïcode", " t t<|x|> ", "<bos>", ""):
        assert theirs.encode(text) == ours.encode(text)
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("name", OTHERS)
def test_what_no_model_can_hold_is_not_saved_as_one(name, tmp_path):
    tokenizer = read(json=tokenizer_json(**OTHERS[name]))
    with pytest.raises(
        CheckpointError, match=r"SentencePiece model cannot hold .* tokenizer\.json"
    ):
        tokenizer.save_model(tmp_path / "tokenizer.model")


def test_the_rest_works_as_with_a_model():
    fields = tokenizer_json(more=[added("<|im_start|>", SIZE, special=True)])
    tokenizer = read(json=fields, config={"eos_token": {"content": "<|im_start|>"}})
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (
        2,
        SIZE,
        0,
        3,
    )
    names = [*(n for n in tiny.CONTROL if n != "<unk>"), "<start_of_image>", "<|im_start|>"]
    assert list(tokenizer.control) == names
    detokenizer = StreamingDetokenizer(tokenizer)
    ids = tokenizer.encode("the é<|im_start|>\u2581")
    assert "".join(map(detokenizer.feed, ids)) == tokenizer.decode(ids) == "the é<|im_start|>\u2581"


def test_without_the_library_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(CheckpointError, match="pip install tokenizers"):
        read(json=tokenizer_json(merges=UNWRITABLE))
    assert read(json=tokenizer_json()).vocab_size == SIZE


def test_gemma_1_spells_the_tab_as_a_byte():
    """transformers puts the tab where its byte piece was."""
    pieces = ["\t" if piece == "<0x09>" else piece for piece in PIECES]
    fields = tokenizer_json(pieces=pieces)
    tokenizer, reference = read(json=fields), Reference(fields)
    assert_same(tokenizer, reference, "the\tthe")
    assert tokenizer.byte_value(PIECES.index("<0x09>")) == 9
    model = tokenizer.model_proto
    assert read(model=model, json=fields).encode("the\tthe") == tokenizer.encode("the\tthe")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "Unigram"}, r"a tokenizer of the kind 'Unigram', expected 'BPE'"),
        ({"byte_fallback": False}, r"model\.byte_fallback is not set"),
        ({"dropout": 0.1}, r"model\.dropout is 0\.1"),
        ({"end_of_word_suffix": "</w>"}, r"model\.end_of_word_suffix is '</w>'"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "byte-level byte-pair encoding"),
        ({"normalizer": {"type": "Prepend", "prepend": "\u2581"}}, "adds or removes spaces"),
        ({"merges": [["t", "x"]]}, r"model\.merges: \['t', 'x'\] has a piece that model\.vocab"),
        ({"merges": ["t h e"]}, r"model\.merges: expected two pieces, got 't h e'"),
        ({"vocab": {}}, r"model\.vocab is missing or empty"),
        ({"vocab": {"<unk>": 0, "a": 0}, "merges": []}, "gives one id to two pieces"),
        ({"vocab": {"<unk>": 0, "a": 1}, "merges": []}, "not 256 byte pieces"),
        (
            {"vocab": {"<unk>": 0, "a": 1 << 23}, "merges": []},
            "8,388,609 pieces in model.vocab, but",
        ),
        ({"unk_token": "<none>"}, "the unknown token '<none>' is not in model.vocab"),
        ({"more": [{"id": SIZE}]}, "an added token without content"),
        ({"more": [added("<x>", -1)]}, "'<x>' has the id -1, expected a whole number"),
    ],
)
def test_a_file_of_another_kind_is_told_by_its_field(changes, message):
    fields = tokenizer_json(**{name: changes[name] for name in changes if name != "more"})
    fields["added_tokens"] = changes.get(
        "more", [] if "vocab" in changes else fields["added_tokens"]
    )
    with pytest.raises(CheckpointError, match=message) as error:
        read(json=fields)
    assert "folder" in str(error.value)


# --- tokens that were added -----------------------------------------------------------------------

SPECIAL, PLAIN = added("<|im_start|>", SIZE, special=True), added("<think>", SIZE + 1)
IDS = {"<|im_start|>": SIZE, "<think>": SIZE + 1}


@pytest.mark.parametrize(
    "files",
    [
        {"config": decoder(SPECIAL, PLAIN)},
        {"added": IDS, "special": {"additional_special_tokens": ["<|im_start|>"]}},
        {"added": IDS, "config": {"extra_special_tokens": {"x": "<|im_start|>"}}},
        {"added": IDS, "config": decoder(SPECIAL, PLAIN)},
        {"json": tokenizer_json(more=[SPECIAL, PLAIN])},
        # transformers 5 lists every added token as "extra special", which is not what it means.
        {
            "json": tokenizer_json(more=[SPECIAL, PLAIN]),
            "config": {"extra_special_tokens": ["<|im_start|>", "<think>", "\n", "<b>"]},
        },
    ],
)
def test_added_tokens_are_control_or_text_as_the_files_say(files):
    tokenizer = read(**files)
    assert tokenizer.pieces([SIZE, SIZE + 1]) == ["<|im_start|>", "<think>"]
    assert tokenizer.control["<|im_start|>"] == SIZE
    assert not {"<think>", "\n", "<b>"} & {*tokenizer.control}
    ids = tokenizer.encode("the<think><|im_start|>")
    assert SIZE + 1 in ids
    assert SIZE not in ids
    assert tokenizer.decode([SIZE, *ids]) == "the<think><|im_start|>"


def test_they_are_found_as_the_library_finds_them_beside_a_model_too():
    more = [added("<a>", SIZE), added("<a><b>", SIZE + 1), *TAKING[1:2]]
    more += [added("<x>", SIZE + 2, lstrip=True)]
    reference = Reference(tokenizer_json(more=more))
    tokenizer = read(config=decoder(*more))
    for text in (
        "<a><b><a>he the he<b>",
        "the\n\n<x> \t<x>\n",
        "he",
        " he\u0301",
        "he_ he\u200d he-",
    ):
        assert_same(tokenizer, reference, text)


def test_renamed_tokens_have_their_new_names():
    entry = added("<|im_start|>", PIECES.index("<unused0>"), special=True)
    tokenizer = read(config=decoder(entry))
    assert tokenizer.control["<|im_start|>"] == entry["id"]
    assert "<unused0>" not in tokenizer.control


def test_rows_between_them_stand_for_nothing():
    tokenizer = read(added={"<x>": SIZE + 2})
    assert tokenizer.encode("<x>") == [SIZE + 2]
    assert tokenizer.pieces([SIZE, SIZE + 1]) == [f"<row {SIZE}>", f"<row {SIZE + 1}>"]
    assert tokenizer.decode([SIZE]) == ""
    assert f"<row {SIZE}>" in tokenizer.control


def test_a_special_token_without_an_id_comes_last_as_in_transformers():
    tokenizer = read(special={"pad_token": "[PAD]", "eos_token": "<end_of_turn>"})
    assert tokenizer.pad_id == tokenizer.control["[PAD]"] == SIZE
    assert tokenizer.eos_id == tokenizer.control["<end_of_turn>"]


def test_tokens_without_a_row_are_left_out_and_named():
    with pytest.warns(UserWarning, match=rf"{SIZE} rows and none for 1 added tokens, '<x>'"):
        tokenizer = read(SIZE, added={"<x>": SIZE})
    assert tokenizer.vocab_size == SIZE
    # In every Gemma 3, also in those that see no images and have no row for it.
    assert read(SIZE, added={"<image_soft_token>": SIZE}).vocab_size == SIZE
    pieces = [*PIECES, "<image_soft_token>"]
    assert read(SIZE, json=tokenizer_json(pieces=pieces)).vocab_size == SIZE
    assert "<image_soft_token>" in read(SIZE + 1, json=tokenizer_json(pieces=pieces)).control


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"added": {"<x>": SIZE}, "config": decoder(added("<y>", SIZE))},
            rf"token {SIZE} is '<y>' in tokenizer_config.json and '<x>' in added_tokens.json",
        ),
        (
            {"added": {"<x>": SIZE}, "config": decoder(added("<x>", SIZE + 1))},
            rf"'<x>' is token {SIZE + 1} in tokenizer_config.json and {SIZE} in added_tokens.json",
        ),
        ({"added": {"<bos>": SIZE}}, rf"'<bos>' is token {SIZE} in added_tokens.json and 2 in the"),
        ({"added": {"<x>": "y"}}, "'<x>' has the id 'y', expected a whole number"),
        ({"config": {"added_tokens_decoder": [1]}}, "expected added_tokens_decoder to be an obj"),
        ({"special": {"additional_special_tokens": 5}}, "expected additional_special_tokens to be"),
    ],
)
def test_files_that_contradict_each_other_are_refused(files, message):
    with pytest.raises(CheckpointError, match=message):
        read(**files)


def test_of_two_vocabularies_the_one_is_taken_that_transformers_takes():
    fields = tokenizer_json(pieces=[*PIECES, "et"], merges=[("t", "h"), ("e", "t")])
    model = read().model_proto
    with pytest.warns(UserWarning, match=rf"token {SIZE} is 'et' in tokenizer.json and None in"):
        tokenizer = read(model=model, json=fields)
    assert tokenizer.encode("et") == [SIZE]


def test_numbers_of_added_tokens_are_the_library_s():
    fields = tokenizer_json(more=[added("<x>", SIZE + 5)])
    with pytest.warns(UserWarning, match=rf"numbers added tokens .* '<x>' {SIZE} for {SIZE + 5}"):
        tokenizer = read(json=fields)
    assert tokenizer.encode("<x>") == Reference(fields)("<x>") == [SIZE]


@pytest.mark.parametrize("name", ["as transformers writes it", *OTHERS])
def test_a_used_tokenizer_can_be_copied(name):
    tokenizer = read(json=tokenizer_json(**{**WRITABLE, **OTHERS}[name]))
    text = "the  <x> he <start_of_turn>"
    control, ids = dict(tokenizer.control), tokenizer.encode(text)
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other.encode(text) == ids
        assert dict(other.control) == control
        assert other.bos_id == tokenizer.bos_id
        assert repr(other) == repr(tokenizer)
