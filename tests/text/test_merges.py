"""Merges as scores, against the tokenizers library and SentencePiece's rule written out."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_nb.text import merges
from tests.text.hugging_face import every_split


def by_scores(text, scores):
    """SentencePiece: join the neighbours whose joint piece scores best, the first of them."""
    symbols = list(text)
    while True:
        pairs = ["".join(pair) for pair in itertools.pairwise(symbols)]
        known = [(-scores[pair], i) for i, pair in enumerate(pairs) if pair in scores]
        if not known:
            return symbols
        _, i = min(known)
        symbols[i : i + 2] = [pairs[i]]


def by_library(pieces, pairs):
    model = tokenizers.models.BPE(vocab=pieces, merges=pairs)
    return lambda text: tokenizers.Tokenizer(model).encode(text).tokens


def scored(pieces, pairs):
    """Scores of every piece of two characters or more, those of no text the lowest; or None."""
    found = merges.scores(pieces, pairs)
    if found is None:
        return None
    return {piece: found.get(piece, -1e9) for piece in pieces if len(piece) > 1}


@settings(max_examples=200)
@given(
    alphabet=st.sampled_from(["a", "ab", "abc"]),
    data=st.data(),
    order=st.sampled_from(["by piece", "long first", "any", "some missing"]),
    seed=st.integers(0, 1 << 30),
)
def test_scores_join_what_the_merges_join(alphabet, data, order, seed):
    words = st.text(alphabet, min_size=2, max_size=6)
    pool = sorted(data.draw(st.sets(words, min_size=1, max_size=12)))
    pieces = {piece: i for i, piece in enumerate([*alphabet, *pool])}
    pairs, rng = every_split([*alphabet, *pool]), random.Random(seed)
    if order == "long first":
        pairs.sort(key=lambda pair: (len("".join(pair)), -len(pair[0])), reverse=True)
    elif order != "by piece":
        rng.shuffle(pairs)
    if data.draw(st.booleans()):  # some twice
        pairs += rng.sample(pairs, len(pairs) // 3)
    if order == "some missing":
        pairs = pairs[: rng.randint(0, len(pairs))]
    scores = scored(pieces, pairs)
    if scores is None:
        return
    library = by_library(pieces, pairs)
    for _ in range(10):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 24)))
        assert by_scores(text, scores) == library(text)


@pytest.mark.parametrize(
    ("pool", "pairs"),
    [
        # Of the two ways to "abc" only one is ever gone, and it is not the first in the list.
        (["abc", "bc", "ab"], [("b", "c"), ("ab", "c"), ("a", "bc"), ("a", "b")]),
        # A run: its longer pieces come before the shorter ones that they are made of.
        (["aaaa", "aaa", "aa"], [("aaa", "a"), ("a", "aaa"), ("aa", "a"), ("a", "aa"), ("a", "a")]),
        (["aa", "aaa", "aaaa"], every_split(["a", "aa", "aaa", "aaaa"])),
        # "abc" is made of three pieces that no merge joins.
        (["abc"], []),
    ],
)
def test_orders_that_scores_can_have(pool, pairs):
    pieces = {piece: i for i, piece in enumerate([*"abc", *pool])}
    scores, library = scored(pieces, pairs), by_library(pieces, pairs)
    assert scores is not None
    for length in range(1, 7):
        for text in map("".join, itertools.product("abc", repeat=length)):
            assert by_scores(text, scores) == library(text)


@pytest.mark.parametrize(
    ("pool", "pairs"),
    [
        (["ab"], []),  # SentencePiece joins any neighbours that spell a piece
        (["ab", "abc"], [("a", "b")]),
        (["xa"], []),  # also a character that the vocabulary lacks
    ],
)
def test_pieces_that_no_merge_joins_have_no_scores(pool, pairs):
    pieces = {piece: i for i, piece in enumerate([*"abc", *pool])}
    assert merges.scores(pieces, pairs) is None


@pytest.mark.real
def test_scores_of_the_real_vocabulary_s_first_pieces(real_tokenizer):
    """Its merges as transformers' converter writes them; pieces formed out of turn among them."""
    names = enumerate(real_tokenizer.pieces(range(real_tokenizer.vocab_size)))
    fixed = re.compile(r"<.*>|\[multimodal\]|[\n\t]+")  # control, bytes, and what is found in texts
    rest = [p for i, p in names if (i < 12_000 or len(p) == 1) and not fixed.fullmatch(p)]
    pieces = {piece: i for i, piece in enumerate(rest)}
    pairs = every_split(rest)
    scores = scored(pieces, pairs)
    assert scores is not None
    library, rng = by_library(pieces, pairs), random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices(rest, k=6)) + "\u2581" * rng.randint(0, 40)
        assert by_scores(text, scores) == library(text)
