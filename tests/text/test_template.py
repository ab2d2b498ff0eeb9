from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_nb.text.template import (
    GemmaTemplate,
    Message,
    RawTemplate,
    Template,
    TranscriptTemplate,
    resolve_template,
)
from tests.text.conftest import texts

TEMPLATES = [GemmaTemplate(), TranscriptTemplate(), RawTemplate()]
every_template = pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
ASKED = [Message("user", "Hi")]
TALK = [*ASKED, Message("model", "Hello!"), Message("user", "And now?")]


def written(tokenizer, ids):
    """The context as text, control pieces by name."""
    names = {id_: piece for piece, id_ in tokenizer.control.items()}
    text, run = "", []
    for id_ in ids:
        if id_ in names:
            text, run = text + tokenizer.decode(run) + names[id_], []
        else:
            run.append(id_)
    return text + tokenizer.decode(run)


# --- the forms ------------------------------------------------------------------------------------


def test_gemma_turns(tiny_tokenizer):
    """As in https://ai.google.dev/gemma/docs/core/prompt-structure."""
    ids = GemmaTemplate().encode(tiny_tokenizer, TALK, "Be brief.")
    assert written(tiny_tokenizer, ids) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
        "<start_of_turn>model\nHello!<end_of_turn>\n"
        "<start_of_turn>user\nAnd now?<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


def test_a_transcript(tiny_tokenizer):
    template = TranscriptTemplate(examples=(("One?", "1."), ("Two?", "2.")))
    ids = template.encode(tiny_tokenizer, TALK, "A talk.")
    assert written(tiny_tokenizer, ids) == (
        "<bos>A talk."
        "\n\nUser: One?\nAssistant: 1."
        "\n\nUser: Two?\nAssistant: 2."
        "\n\nUser: Hi\nAssistant: Hello!"
        "\n\nUser: And now?\nAssistant:"
    )


def test_raw_text(tiny_tokenizer):
    ids = RawTemplate().encode(tiny_tokenizer, [Message("user", "Once upon"), *TALK[1:]], "S. ")
    assert written(tiny_tokenizer, ids) == "<bos>S. Once uponHello!And now?"


def test_system_text_is_the_templates_own_unless_given(tiny_tokenizer):
    template = TranscriptTemplate(default_system="By default.", examples=())
    for system, head in [(None, "By default."), ("Mine.", "Mine."), ("", "")]:
        ids = template.encode(tiny_tokenizer, ASKED, system)
        assert written(tiny_tokenizer, ids) == f"<bos>{head}\n\nUser: Hi\nAssistant:"
    plain = "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    for system in (None, ""):
        assert (
            written(tiny_tokenizer, GemmaTemplate().encode(tiny_tokenizer, ASKED, system)) == plain
        )


@every_template
def test_nothing_said_yet(tiny_tokenizer, template):
    assert template.encode(tiny_tokenizer, [], "")[0] == tiny_tokenizer.bos_id


@pytest.mark.parametrize("template", TEMPLATES[:2], ids=lambda t: t.name)
def test_space_around_a_users_text_is_no_part_of_it(tiny_tokenizer, template):
    spaced = template.encode(tiny_tokenizer, [Message("user", "\n  Hi \n")])
    assert spaced == template.encode(tiny_tokenizer, ASKED)


@every_template
@given(text=texts, system=texts)
def test_no_text_can_forge_a_control_piece(tiny_tokenizer, template, text, system):
    """The context holds as many of them as that of an innocent text."""
    control = set(tiny_tokenizer.control.values())
    counts = [
        sum(id_ in control for id_ in template.encode(tiny_tokenizer, [Message("user", t)], s))
        for t, s in [(text, system), ("Hi", "Hello")]
    ]
    assert counts[0] == counts[1]


# --- prefixes -------------------------------------------------------------------------------------


@every_template
@given(data=st.data())
def test_a_conversation_is_a_prefix_of_its_continuation(tiny_tokenizer, template, data):
    """Whatever ids the model sampled, tidy or not."""
    ordinary = sorted(set(range(tiny_tokenizer.vocab_size)) - set(tiny_tokenizer.control.values()))
    replies = st.lists(st.sampled_from(ordinary), max_size=6).map(tuple)
    messages = []
    for _ in range(data.draw(st.integers(1, 3))):
        ids = data.draw(replies)
        messages += [Message("user", data.draw(texts))]
        messages += [Message("model", tiny_tokenizer.decode(ids), ids)]
    system = data.draw(st.one_of(st.none(), texts))
    whole = template.encode(tiny_tokenizer, messages, system)
    for count in range(1, len(messages)):
        part = template.encode(tiny_tokenizer, messages[:count], system)
        assert whole[: len(part)] == part


@every_template
def test_a_reply_is_what_was_sampled(tiny_tokenizer, template):
    """Not its text tokenized again."""
    prompt = template.encode(tiny_tokenizer, ASKED)
    sampled = (*tiny_tokenizer.encode(" Hel"), *tiny_tokenizer.encode("lo"))
    ids = template.encode(tiny_tokenizer, [*ASKED, Message("model", "something else", sampled)])
    assert tuple(ids[len(prompt) :][: len(sampled)]) == sampled


# --- what ends a reply, and what is never in it ---------------------------------------------------


@every_template
def test_stop_and_forbidden_ids_share_out_the_control_pieces(tiny_tokenizer, template):
    stops = template.stop_ids(tiny_tokenizer)
    forbidden = template.forbidden_ids(tiny_tokenizer)
    assert stops == {tiny_tokenizer.eos_id, tiny_tokenizer.control["<end_of_turn>"]}
    assert stops.isdisjoint(forbidden)
    assert {*stops, *forbidden} == {*tiny_tokenizer.control.values(), tiny_tokenizer.unk_id}


@pytest.mark.parametrize("roles", ["model", "user user", "user model model"])
def test_turns_out_of_order_are_refused(tiny_tokenizer, roles):
    messages = [Message(role, "text") for role in roles.split()]
    with pytest.raises(ValueError, match="user and model speak by turns"):
        GemmaTemplate().encode(tiny_tokenizer, messages)


# --- choosing -------------------------------------------------------------------------------------


def test_auto_follows_the_tuning():
    assert resolve_template("auto", "instruction") == GemmaTemplate()
    assert resolve_template("auto", "base") == TranscriptTemplate()


@every_template
def test_templates_are_found_by_name_and_passed_through(template):
    assert resolve_template(template.name) == template
    assert resolve_template(template) is template


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="expected 'auto', 'gemma', 'transcript', 'none' or"):
        resolve_template("chatml")


def test_a_template_of_ones_own_is_a_change_of_fields():
    mine = dataclasses.replace(TranscriptTemplate(), labels=("Q", "A"), stop_strings=("\nQ:",))
    assert isinstance(mine, Template)
    assert mine.stop_strings == ("\nQ:",)


@pytest.mark.real
def test_the_transcript_keeps_words_whole(real_tokenizer):
    """The prompt ends before the space, which is part of the reply's first token."""
    template = TranscriptTemplate()
    prompt = template.encode(real_tokenizer, ASKED)
    assert real_tokenizer.pieces(prompt[-2:]) == ["Assistant", ":"]
    replied = template.encode(real_tokenizer, [*ASKED, Message("model", "The answer")])
    assert real_tokenizer.pieces(replied[len(prompt) :]) == ["\u2581The", "\u2581answer"]


@pytest.mark.real
def test_segments_are_tokenized_as_the_whole_would_be(real_tokenizer):
    """Between control pieces, Gemma's turns are those of one text tokenized at once."""
    ids = GemmaTemplate().encode(real_tokenizer, TALK, "Be brief.")
    control = real_tokenizer.control
    segments = [["user\nBe brief.\n\nHi", "\n"], ["model\nHello!", "\n"], ["user\nAnd now?", "\n"]]
    expected = [real_tokenizer.bos_id]
    for turn, after in segments:
        expected += [control["<start_of_turn>"], *real_tokenizer.encode(turn)]
        expected += [control["<end_of_turn>"], *real_tokenizer.encode(after)]
    expected += [control["<start_of_turn>"], *real_tokenizer.encode("model\n")]
    assert ids == expected
