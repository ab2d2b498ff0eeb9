from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_nb.text.detokenizer import StreamingDetokenizer
from tests.text.conftest import texts

# Bytes that begin characters, go on in them, or may do neither, more often than chance has them.
odd_bytes = st.sampled_from(b"\x00\x41\x80\x81\x90\x96\x9f\xbf\xc0\xc2\xe0\xe2\xed\xef\xf0\xf4\xf5")


def feed_all(tokenizer, ids):
    detokenizer = StreamingDetokenizer(tokenizer)
    outputs = [detokenizer.feed(id_) for id_ in ids]
    return [*outputs, detokenizer.finish()]


def byte_ids(tokenizer, raw):
    return [tokenizer.encode("\0")[0] + byte for byte in raw]


@given(text=texts)
def test_a_texts_tokens_give_the_text(tiny_tokenizer, text):
    outputs = feed_all(tiny_tokenizer, tiny_tokenizer.encode(text))
    assert "".join(outputs) == text
    assert outputs[-1] == ""


@pytest.mark.real
@settings(max_examples=1000)
@given(text=texts)
def test_a_texts_tokens_give_the_text_with_the_real_vocabulary(real_tokenizer, text):
    assert "".join(feed_all(real_tokenizer, real_tokenizer.encode(text))) == text


@settings(max_examples=500)
@given(data=st.data())
def test_any_tokens_give_what_decoding_them_at_once_gives(tiny_tokenizer, data):
    """Broken UTF-8 and control pieces anywhere in it included."""
    ids = data.draw(
        st.lists(
            st.one_of(
                odd_bytes.map(lambda byte: byte_ids(tiny_tokenizer, [byte])[0]),
                st.integers(0, tiny_tokenizer.vocab_size - 1),
                st.sampled_from([tiny_tokenizer.control["<end_of_turn>"], tiny_tokenizer.unk_id]),
            ),
            max_size=20,
        )
    )
    assert "".join(feed_all(tiny_tokenizer, ids)) == tiny_tokenizer.decode(ids)


def test_a_character_appears_with_its_last_byte(tiny_tokenizer):
    ids = byte_ids(tiny_tokenizer, "a👋é".encode())
    assert feed_all(tiny_tokenizer, ids) == ["a", "", "", "", "👋", "", "é", ""]


def test_an_unfinished_character_ends_as_replacements(tiny_tokenizer):
    ids = byte_ids(tiny_tokenizer, "👋".encode()[:3])
    assert feed_all(tiny_tokenizer, ids) == ["", "", "", "\ufffd\ufffd\ufffd"]


@pytest.mark.parametrize("next_piece", ["<end_of_turn>", "\n"])
def test_another_piece_breaks_a_character(tiny_tokenizer, next_piece):
    vocabulary = tiny_tokenizer.pieces(range(tiny_tokenizer.vocab_size))
    first, *rest = byte_ids(tiny_tokenizer, "é".encode())
    ids = [first, vocabulary.index(next_piece), *rest]
    text = {"<end_of_turn>": "", "\n": "\n"}[next_piece]
    assert feed_all(tiny_tokenizer, ids) == ["", "\ufffd" + text, "\ufffd", ""]


def test_a_byte_that_cannot_follow_is_not_waited_for(tiny_tokenizer):
    """A surrogate (ED A0 80) is no character: known at its second byte."""
    ids = byte_ids(tiny_tokenizer, b"\xed\xa0\x80x")
    assert feed_all(tiny_tokenizer, ids) == ["", "\ufffd\ufffd", "\ufffd", "x", ""]


def test_a_detokenizer_can_be_used_again_after_finish(tiny_tokenizer):
    detokenizer = StreamingDetokenizer(tiny_tokenizer)
    first, second = byte_ids(tiny_tokenizer, "é".encode())
    assert (detokenizer.feed(first), detokenizer.finish()) == ("", "\ufffd")
    assert (detokenizer.feed(first), detokenizer.feed(second)) == ("", "é")
