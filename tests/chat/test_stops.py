"""Stop strings, against cutting the whole text at once."""

from hypothesis import given
from hypothesis import strategies as st

from gemma_nb.chat.stops import StopMatcher

texts = st.lists(st.text("ab\n ", max_size=4), max_size=12)
stop_strings = st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3)


def run(pieces, stops, **kwargs):
    """Feeds pieces until a stop string ends it; returns the matcher and the released texts."""
    matcher = StopMatcher(stops, **kwargs)
    released, shown = [], []
    for piece in pieces:
        released += matcher.feed(piece)
        shown.append("".join(released))
        if matcher.matched:
            return matcher, released, shown
    return matcher, released + matcher.flush(), shown


def cut(text, stops):
    return text[: min((text.find(s) for s in stops if s in text), default=len(text))]


@given(pieces=texts, stops=stop_strings)
def test_the_text_ends_before_the_first_stop_string(pieces, stops):
    matcher, released, shown = run(pieces, stops)
    fed = pieces[: len(released)]
    assert "".join(released) == cut("".join(fed), stops)
    assert bool(matcher.matched) == any(s in "".join(fed) for s in stops)
    # Nothing is shown that would have to be taken back.
    assert all("".join(released).startswith(text) for text in shown)


@given(pieces=texts, stops=stop_strings)
def test_every_token_comes_back_once_and_in_order(pieces, stops):
    matcher, released, _ = run(pieces, stops)
    assert len(released) == (len(pieces) if not matcher.matched else len(released))
    assert all(piece.startswith(text) for piece, text in zip(pieces, released, strict=False))


@given(pieces=texts, stops=stop_strings)
def test_space_before_the_first_word_ends_nothing(pieces, stops):
    _, released, _ = run(pieces, stops, skip_leading_space=True)
    blank = 0
    while blank < len(pieces) and not pieces[blank].strip():
        blank += 1
    after = "".join(pieces[blank : len(released)])
    assert "".join(released) == "".join(pieces[:blank]) + cut(after, stops)


def test_a_token_is_held_only_while_it_may_begin_a_stop_string():
    matcher = StopMatcher(["\nUser:"])
    assert matcher.feed("Hi") == ["Hi"]
    assert matcher.feed("\n") == []
    assert matcher.feed("Us") == []
    assert matcher.feed("age") == ["\n", "Us", "age"]
    assert matcher.feed("!\nU") == []
    assert matcher.feed("ser: x") == ["!", ""]
    assert matcher.matched == "\nUser:"
