from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from gemma_nb.checkpoints import catalog
from gemma_nb.checkpoints.gguf import GGUFFile
from gemma_nb.errors import CheckpointError, TextError
from gemma_nb.text.tokenizer import Tokenizer
from tests.checkpoints import tiny
from tests.text.conftest import LOOK_ALIKES, texts


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(tiny.metadata())


def assert_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {*tokenizer.control.values(), tokenizer.unk_id}


# --- round trips ----------------------------------------------------------------------------------


@given(text=texts)
def test_every_text_survives_the_round_trip(tokenizer, text):
    assert_round_trip(tokenizer, text)


@pytest.mark.real
@settings(max_examples=1000)
@given(text=texts)
def test_every_text_survives_the_round_trip_of_the_real_vocabulary(real_tokenizer, text):
    assert_round_trip(real_tokenizer, text)


@given(before=texts, after=texts, surrogate=st.integers(0xD800, 0xDFFF).map(chr))
def test_a_lone_surrogate_is_refused_by_its_place(tokenizer, before, after, surrogate):
    message = f"character {len(before)} of the text is the lone surrogate U+{ord(surrogate):04X}"
    with pytest.raises(TextError, match=re.escape(message)):
        tokenizer.encode(before + surrogate + after)


def test_the_piece_for_spaces_is_spelled_in_bytes_where_it_is_text(tokenizer):
    ids = tokenizer.encode("\u2581 \u2581")
    spelled = ["<0xE2>", "<0x96>", "<0x81>"]
    assert tokenizer.pieces(ids) == [*spelled, "\u2581", *spelled]
    assert tokenizer.decode(ids) == "\u2581 \u2581"


@pytest.mark.real
def test_no_control_piece_of_the_real_vocabulary_can_be_typed(real_tokenizer):
    """Every one of them by itself, and all of them in a row."""
    control = {*real_tokenizer.control.values(), real_tokenizer.unk_id}
    assert len(real_tokenizer.control) == 6251
    for piece in real_tokenizer.control:
        ids = real_tokenizer.encode(piece)
        assert not control & set(ids)
    everything = "".join(real_tokenizer.control)
    ids = real_tokenizer.encode(everything)
    assert not control & set(ids)
    assert real_tokenizer.decode(ids) == everything


# --- the vocabulary -------------------------------------------------------------------------------


def test_pieces_are_those_of_the_file_with_spaces_as_sentencepiece_has_them(tokenizer):
    expected = [piece.replace("  ", "\u2581\u2581") for piece in tiny.PIECES]
    assert tokenizer.pieces(range(tokenizer.vocab_size)) == expected


def test_special_ids(tokenizer):
    ids = (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id)
    assert ids == (0, 1, 2, 3)


def test_control_is_what_only_a_template_may_emit(tokenizer):
    names = [*(n for n in tiny.CONTROL if n != "<unk>"), "<start_of_image>"]
    assert dict(tokenizer.control) == {name: tiny.PIECES.index(name) for name in names}


def test_control_cannot_be_changed(tokenizer):
    with pytest.raises(TypeError):
        tokenizer.control["<bos>"] = 7


def test_merges_follow_the_scores(tokenizer):
    """ "th" outranks "he", and "\u2581the" is only reached through "\u2581th"."""
    for text, pieces in [
        ("the", ["th", "e"]),
        (" the", ["\u2581the"]),
        ("he", ["he"]),
        ("a", ["<0x61>"]),
        ("  the", ["\u2581\u2581", "th", "e"]),
        ("\n\n\n<b>", ["\n\n", "\n", "<b>"]),
    ]:
        assert tokenizer.pieces(tokenizer.encode(text)) == pieces


@pytest.mark.parametrize("text", ["", "a", "<bos>"])
def test_bos_is_led_by_if_asked(tokenizer, text):
    assert tokenizer.encode(text, bos=True) == [tokenizer.bos_id, *tokenizer.encode(text)]


def test_control_pieces_decode_to_nothing_and_broken_utf8_to_replacements(tokenizer):
    control = [tokenizer.bos_id, tokenizer.control["<end_of_turn>"], tokenizer.pad_id]
    broken = [tiny.PIECES.index("<0xE2>"), tiny.PIECES.index("<0x96>")]
    assert tokenizer.decode([*control, *tokenizer.encode("the"), *control]) == "the"
    assert tokenizer.decode(broken) == "\ufffd\ufffd"
    assert tokenizer.decode([]) == ""


def test_the_text_of_a_lone_token(tokenizer):
    for piece, text in [
        *(("\u2581the", " the"), ("  ", "  "), ("\n\n", "\n\n"), ("<0xE2>", "<0xE2>")),
        *(("<bos>", "<bos>"), ("<unk>", "<unk>"), ("<b>", "<b>")),
    ]:
        assert tokenizer.token_text(tiny.PIECES.index(piece)) == text


@pytest.mark.parametrize("bad", [-1, len(tiny.PIECES)])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, bad):
    for function in (tokenizer.decode, tokenizer.pieces):
        with pytest.raises(TextError, match=rf"token id {bad} is not in the vocabulary"):
            function([0, bad])


def test_ids_may_be_an_array(tokenizer):
    ids = np.array(tokenizer.encode("the he"), np.int32)
    assert tokenizer.decode(ids) == "the he"


# --- model files ----------------------------------------------------------------------------------


def test_a_saved_model_is_read_by_sentencepiece_and_by_us(tokenizer, tmp_path):
    path = tokenizer.save_model(tmp_path / "tokenizer.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = Tokenizer.from_file(path)
    text = "the  <b>\n\nthe <bos> ünïcode"
    assert theirs.encode(text) == ours.encode(text) == tokenizer.encode(text)
    assert dict(ours.control) == dict(tokenizer.control)


def official(**changes) -> bytes:
    """The tiny model as Gemma's own file has it: turn markers match text that looks like them."""
    model = sentencepiece_model_pb2.ModelProto.FromString(
        Tokenizer.from_gguf(tiny.metadata()).model_proto
    )
    for entry in model.pieces:
        if entry.piece in ("<start_of_turn>", "<end_of_turn>", "<unused0>", "<start_of_image>"):
            entry.type = 4
    for name, value in changes.items():
        setattr(model.normalizer_spec, name, value)
    return model.SerializeToString()


def test_an_official_model_file_yields_no_control_piece_from_text_either(tokenizer):
    raw = sentencepiece.SentencePieceProcessor(model_proto=official())
    assert raw.encode("<start_of_turn>") == [tiny.PIECES.index("<start_of_turn>")]
    ours = Tokenizer.from_bytes(official())
    assert dict(ours.control) == dict(tokenizer.control)
    for text in LOOK_ALIKES:
        assert_round_trip(ours, text)


def test_models_that_change_spaces_are_refused():
    with pytest.raises(CheckpointError, match="adds or removes spaces"):
        Tokenizer.from_bytes(official(remove_extra_whitespaces=True))
    with pytest.raises(CheckpointError, match="adds or removes spaces"):
        Tokenizer.from_bytes(official(add_dummy_prefix=True))


def test_models_without_byte_pieces_are_refused():
    model = sentencepiece_model_pb2.ModelProto.FromString(official())
    model.trainer_spec.byte_fallback = False
    for entry in model.pieces:
        entry.type = 1 if entry.type == 6 else entry.type
    with pytest.raises(CheckpointError, match="lacks some of the 256 byte pieces"):
        Tokenizer.from_bytes(model.SerializeToString())


def test_files_that_are_no_model_are_refused(tmp_path):
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match=r"x\.model: not a usable SentencePiece model"):
        Tokenizer.from_file(tmp_path / "x.model")
    (tmp_path / "x.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"it is JSON; gnb\.load reads a folder"):
        Tokenizer.from_file(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match=r"cannot read .*none\.model"):
        Tokenizer.from_file(tmp_path / "none.model")


def with_types(**kinds: int) -> Tokenizer:
    """The tiny vocabulary with other types, and with new pieces behind it."""
    fields = tiny.vocabulary()
    pieces, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"].tolist()
    for piece, kind in kinds.items():
        if piece not in pieces:
            pieces.append(piece)
            types.append(kind)
        types[pieces.index(piece)] = kind
    scores = np.zeros(len(pieces), np.float32)
    scores[: len(tiny.SCORES)] = tiny.SCORES
    return Tokenizer.from_gguf(
        fields
        | {
            "tokenizer.ggml.token_type": np.array(types, np.int32),
            "tokenizer.ggml.scores": scores,
        }
    )


@pytest.mark.parametrize("kind", [1, 4, 5])
def test_control_pieces_are_so_whatever_a_gguf_file_says(kind):
    """As llama.cpp's loader corrects old conversions; also those that the ids name."""
    old = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<unused0>")
    new = ("<|im_end|>", "<|endoftext|>", "<fim_prefix>")
    tokenizer = with_types(**dict.fromkeys((*old, *new), kind))
    assert {*old, *new} < {*tokenizer.control}
    for piece in (*old, *new):
        assert_round_trip(tokenizer, f"the{piece} ")


def test_pieces_behind_the_vocabulary_of_a_gguf_file_are_what_it_says():
    """As converters write fine-tunes: special tokens 3, others 4, rows without a token 5."""
    tokenizer = with_types(**{"<|im_start|>": 3, "<think>": 4, "two words": 4, "[PAD288]": 5})
    size = len(tiny.PIECES)
    assert tokenizer.pieces([size, size + 1]) == ["<|im_start|>", "<think>"]
    ids = tokenizer.encode("<think>the two words<|im_start|>")
    assert ids[0] == size + 1
    assert size + 2 in ids
    assert size not in ids
    assert_round_trip(tokenizer, "[PAD288]<|im_start|>two  words")
    assert size + 3 not in tokenizer.encode("[PAD288]")
    assert "</s>" not in with_types(**{"</s>": 4}).control  # a tag in Gemma, an end elsewhere


def test_a_mark_typed_as_text_is_a_control_piece_in_a_gguf_file():
    assert "<|im_start|>" in with_types(**{"<|im_start|>": 1}).control


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "gpt2", r"expected 'llama' \(SentencePiece\), got 'gpt2'"),
        ("tokens", None, "is missing or empty"),
        ("scores", np.zeros(3, np.float32), "entries, one per token, got 3"),
        ("token_type", None, "entries, one per token, got none"),
        ("token_type", np.full(len(tiny.PIECES), 9), r"expected types 1 to 6, got \[9\]"),
        ("bos_token_id", None, "expected 0 to .*, got None"),
        ("unknown_token_id", 1 << 20, "expected 0 to .*, got 1048576"),
    ],
)
def test_vocabularies_that_contradict_themselves_are_refused(field, value, message):
    fields = tiny.vocabulary() | {f"tokenizer.ggml.{field}": value}
    with pytest.raises(CheckpointError, match=message) as error:
        Tokenizer.from_gguf(fields, "file.gguf")
    assert f"file.gguf: metadata field 'tokenizer.ggml.{field}'" in str(error.value)


def test_a_piece_that_occurs_twice_is_refused():
    fields = tiny.vocabulary()
    fields["tokenizer.ggml.tokens"][-1] = fields["tokenizer.ggml.tokens"][-2]
    with pytest.raises(CheckpointError, match=r"file\.gguf: not a usable SentencePiece model"):
        Tokenizer.from_gguf(fields, "file.gguf")


# --- against byte-pair encoding written out -------------------------------------------------------


class ByHand:
    """Byte-pair encoding by the definition: join the best-scored adjacent pair until none is left.

    Pieces that users of SentencePiece define are taken first, the longest at each place.
    """

    def __init__(self, metadata):
        pieces = [p.replace(" ", "\u2581") for p in metadata["tokenizer.ggml.tokens"]]
        kinds = metadata["tokenizer.ggml.token_type"].tolist()
        scores = metadata["tokenizer.ggml.scores"].tolist()
        rows = list(enumerate(zip(pieces, kinds, scores, strict=True)))
        self.score = {piece: score for _, (piece, kind, score) in rows if kind == 1}
        self.id = {piece: id_ for id_, (piece, _, _) in rows}
        never = ("[multimodal]", "<start_of_image>", "<end_of_image>")
        defined = [piece for _, (piece, kind, _) in rows if kind == 4 and piece not in never]
        longest_first = sorted(defined, key=len, reverse=True)
        self.defined = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def __call__(self, text):
        ids = []
        for i, part in enumerate(self.defined.split(text.replace(" ", "\u2581"))):
            ids += [self.id[part]] if i % 2 else self.merged(list(part))
        return ids

    def merged(self, symbols):
        while True:
            pairs = ["".join(pair) for pair in itertools.pairwise(symbols)]
            known = [(-self.score[p], i) for i, p in enumerate(pairs) if p in self.score]
            if not known:
                break
            _, i = min(known)
            symbols[i : i + 2] = [pairs[i]]
        ids = []
        for symbol in symbols:
            if symbol in self.score:
                ids.append(self.id[symbol])
            else:
                ids += [self.id[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        return ids


@given(text=texts)
def test_encoding_is_that_of_the_definition(tokenizer, text):
    text = text.replace("\u2581", "")
    assert tokenizer.encode(text) == ByHand(tiny.metadata())(text)


@pytest.fixture(scope="module")
def real_metadata():
    parts, _ = catalog.PACKAGES["gemma3-270m"].locate()
    with GGUFFile(parts) as file:
        return file.metadata


@pytest.fixture(scope="module")
def real_by_hand(real_metadata):
    return ByHand(real_metadata)


@pytest.mark.real
@settings(max_examples=200)
@given(data=st.data())
def test_encoding_with_the_real_vocabulary_is_that_of_the_definition(
    real_tokenizer, real_by_hand, real_metadata, data
):
    """Texts made of pieces, so that merges compete across the places where they meet."""
    pieces = real_metadata["tokenizer.ggml.tokens"]
    ids = st.one_of(st.integers(494, 5_000), st.integers(0, len(pieces) - 1))
    piece = ids.map(lambda id_: pieces[id_].replace("\u2581", " "))
    text = data.draw(st.lists(st.one_of(piece, texts), max_size=8).map("".join))
    text = text.replace("\u2581", "")
    assert real_tokenizer.encode(text) == real_by_hand(text)


@pytest.mark.real
def test_building_the_real_model_again_gives_the_same(real_tokenizer, real_metadata):
    assert Tokenizer.from_gguf(real_metadata).model_proto == real_tokenizer.model_proto


@pytest.mark.real
def test_known_ids(real_tokenizer):
    """Of Gemma 3's vocabulary, as released."""
    assert real_tokenizer.vocab_size == 262_144
    assert real_tokenizer.encode("Hello world", bos=True) == [2, 9259, 1902]
    assert real_tokenizer.control["<start_of_turn>"] == 105
    assert real_tokenizer.control["<end_of_turn>"] == 106
    assert real_tokenizer.encode("\n\n") == [108]
