"""The session on a tiny random model: what it keeps, reuses, refuses and survives."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb.errors import BusyError, NonFiniteLogitsError, TextError
from tests.chat.checks import SAMPLING, assert_parity

# --- replies --------------------------------------------------------------------------------------


def test_events_turn_and_text_agree(make):
    chat = make()
    events = list(chat.stream("Hello"))
    user, turn = chat.turns
    assert (user.role, user.text, turn.role) == ("user", "Hello", "model")
    assert [event.token_id for event in events] == [record.token_id for record in turn.tokens]
    assert "".join(event.text for event in events) == turn.text
    assert [event.index for event in events] == list(range(len(events)))
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == turn.finish_reason
    assert events[-1].cache_used == chat.cache_used
    assert chat.partial is None
    assert not chat.busy


def test_three_turns_equal_passes_without_a_cache(make, score):
    chat = make()
    for text in ("Hello", "Once more, and longer than the window of eight", "Bye"):
        assert_parity(chat, chat.chat(text), score)
    for turn in chat.turns:
        if turn.role == "model":
            assert_parity(chat, turn, score)


@pytest.mark.parametrize("template", ["gemma", "transcript", "none"])
def test_later_turns_compute_only_what_is_new(make, template, score):
    chat = make(template=template)
    first = chat.chat("Hello")
    second = chat.chat("And now?")
    context = chat.tokens(second)
    new = len(context) - len(second.tokens) - len(chat.tokens(first))
    # The last token of the first reply was chosen but never fed.
    assert second.timing.prompt_tokens <= new + 2
    assert_parity(chat, second, score)


def test_max_new_tokens(make):
    turn = make(sampling=dataclasses.replace(SAMPLING, max_new_tokens=3)).chat("Hello")
    assert turn.finish_reason in ("length", "stop")
    assert len(turn.tokens) <= 3
    assert "max_new_tokens (3)" in turn.finish_detail or turn.finish_reason == "stop"


def test_a_control_token_ends_the_turn_and_keeps_its_evidence(make, tiny_model):
    _, tokenizer = tiny_model
    everything_else = tuple(set(range(tokenizer.vocab_size)) - {tokenizer.eos_id})
    chat = make(sampling=dataclasses.replace(SAMPLING, forbidden=everything_else))
    turn = chat.chat("Hello")
    assert (turn.finish_reason, turn.text, turn.ids) == ("stop", "", ())
    assert [record.token_id for record in turn.tokens] == [tokenizer.eos_id]
    assert len(turn.tokens[0].alternatives) == 10
    assert "<eos>" in turn.finish_detail


def test_stop_strings_end_the_reply_before_them(make, score):
    whole = make().chat("Hello")
    # A token's whole text, from the middle of the reply.
    stop = next(record.text for record in whole.tokens[3:] if record.text.strip())
    cut = whole.text.find(stop)
    chat = make(sampling=dataclasses.replace(SAMPLING, stop=(stop,)))
    turn = chat.chat("Hello")
    assert turn.text == whole.text[:cut]
    assert (turn.finish_reason, turn.tokens[-1].text) == ("stop", "")
    assert chat.tokenizer.decode(turn.ids) == turn.text
    assert_parity(chat, turn, score)
    assert_parity(chat, chat.chat("Go on"), score)


def test_forbidden_tokens_never_come(make):
    plain = make().chat("Hello")
    chosen = {record.token_id for record in plain.tokens}
    chat = make(sampling=dataclasses.replace(SAMPLING, forbidden=tuple(chosen)))
    turn = chat.chat("Hello")
    assert not chosen & {record.token_id for record in turn.tokens}
    # The model still considered them, and the evidence says so.
    considered = {a.token_id: a for record in turn.tokens for a in record.alternatives}
    assert any(considered[i].probability == 0 for i in chosen & considered.keys())


def test_same_seed_same_reply(make):
    first, again = make().chat("Hello"), make().chat("Hello")
    assert first.tokens == again.tokens
    other = make(sampling=dataclasses.replace(SAMPLING, seed=2)).chat("Hello")
    assert first.text != other.text


def test_a_drawn_seed_is_recorded_and_replays(make):
    drawn = make(sampling=dataclasses.replace(SAMPLING, seed=None)).chat("Hello")
    replayed = make(sampling=drawn.sampling).chat("Hello")
    assert replayed.tokens == drawn.tokens


def test_regenerating_adds_a_branch(make, score):
    chat = make()
    first = chat.chat("Hello")
    second = chat.regenerate()
    assert chat.turns == (chat.turns[0], second)
    assert second.tokens != first.tokens
    assert second.sampling.seed == first.sampling.seed + 1
    assert [turn.id for turn in chat.tree] == [1, first.id, second.id]
    assert second.timing.prompt_tokens == 1
    assert_parity(chat, second, score)
    with pytest.raises(ValueError, match="send a message first"):
        make().regenerate()


def test_a_new_conversation_starts_empty(make, score):
    chat = make()
    first = chat.chat("Hello")
    chat.new_conversation()
    assert chat.turns == ()
    assert chat.cache_used == 1  # <bos>
    again = chat.chat("Hello")
    assert again.text == first.text
    assert first in list(chat.tree)


def test_the_system_text_holds_from_the_next_reply_on(make, score):
    chat = make(system="Be kind.")
    first = chat.chat("Hello")
    chat.system = "Be stern."
    second = chat.chat("Again")
    opening = chat.tokenizer.encode("Be stern.")
    assert chat.tokens(second)[1 : 1 + len(opening)] == opening
    assert second.timing.prompt_tokens > len(first.tokens)
    assert_parity(chat, second, score)


# --- ends from outside ----------------------------------------------------------------------------


def test_a_full_context_ends_the_turn_and_says_so(make):
    chat = make(cache_length=20, sampling=dataclasses.replace(SAMPLING, max_new_tokens=100))
    turn = chat.chat("Hello there")
    assert turn.finish_reason == "length"
    assert "context is full: 20 of 20" in turn.finish_detail
    assert chat.cache_used == 20
    # One token more than there are positions: the last is chosen, and never fed.
    assert len(chat.tokens(turn)) == 21
    after = chat.chat("Still there?")
    assert (after.finish_reason, after.tokens) == ("length", ())
    assert "needs" in after.finish_detail
    chat.new_conversation()
    assert chat.chat("Hi").tokens


def test_an_overlapping_send_is_refused(make):
    chat = make()
    stream = chat.stream("Hello")
    next(stream)
    with pytest.raises(BusyError, match=r"chat\.stop\(\)"):
        chat.stream("Me too")
    with pytest.raises(BusyError):
        chat.regenerate()
    with pytest.raises(BusyError):
        chat.system = "Other"
    with pytest.raises(BusyError):
        chat.new_conversation()
    list(stream)
    assert [turn.text for turn in chat.turns if turn.role == "user"] == ["Hello"]


def test_two_threads_never_share_a_session(make):
    chat = make()
    outcomes = []

    def send():
        try:
            outcomes.append(chat.chat("Hello").role)
        except BusyError:
            outcomes.append("busy")

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 4
    assert "model" in outcomes
    assert len(chat.turns) == 2 * outcomes.count("model")


def test_nan_logits_name_the_position(tiny_model):
    model, tokenizer = tiny_model
    broken = jax.tree.map(lambda x: x * jnp.nan, model.params["final_norm"])
    chat = gnb.ChatSession(
        model.replace(params={**model.params, "final_norm": broken}),
        tokenizer,
        cache_length=100,
        template="none",
    )
    with pytest.raises(NonFiniteLogitsError, match="position 5"):
        chat.chat("Hello")
    assert chat.turns[-1].finish_reason == "error"
    assert "NaN" in chat.turns[-1].finish_detail
    assert not chat.busy


def test_bad_messages_are_refused_before_anything_is_said(make):
    chat = make()
    with pytest.raises(TextError):
        chat.stream("lone \ud800 surrogate")
    with pytest.raises(TypeError, match="string"):
        chat.stream(None)
    assert chat.turns == ()


def test_impossible_sessions_are_refused(make):
    with pytest.raises(ValueError, match="2 to 4096"):
        make(cache_length=5000)
    with pytest.raises(ValueError, match="unknown template"):
        make(template="chatml")
    with pytest.raises(ValueError, match="sampling"):
        make().sampling = "greedy"


# --- warming up, looking --------------------------------------------------------------------------


def test_warming_up_leaves_the_template_in_the_cache(make):
    chat = make(template="transcript", cache_length=1000)
    seen = []
    chat.warmup(lambda fraction, text: seen.append(fraction))
    assert seen[0] == 0
    assert seen == sorted(seen)
    assert seen[-1] == 1
    opening = chat.cache_used
    assert opening > 100
    turn = chat.chat("Hello")
    assert turn.timing.prompt_tokens < len(chat.tokens(turn)) - opening + 2


def test_tables_list_every_token(make):
    turn = make().chat("Hello")
    table = turn.table(k=2)
    assert len(table) == len(turn.tokens)
    np.testing.assert_allclose(table["probability"], np.exp([r.logprob for r in turn.tokens]))
    assert list(table["rank"]) == [record.rank + 1 for record in turn.tokens]


def test_traces_follow_the_positions_of_the_turn(make):
    chat = make()
    first, _ = chat.chat("Hello"), chat.chat("More")
    trace = chat.trace(first)
    for record in first.tokens:
        assert trace.tokens[record.position] == record.token_id
    assert len(chat.trace().tokens) > len(trace.tokens)
    with pytest.raises(ValueError, match="no reply yet"):
        make().trace()


def test_rows_of_the_embedding_that_stand_for_no_token_are_never_drawn(tiny_model):
    model, tokenizer = tiny_model
    table = model.params["embedder"]["input_embedding"]
    # More rows than the vocabulary has, and likelier than all of it.
    wide = jnp.concatenate([table, 30 * table[:8]])
    config = dataclasses.replace(model.config, num_embed=len(wide))
    padded = gnb.GemmaTransformer(
        params={**model.params, "embedder": {"input_embedding": wide}},
        config=config,
        transformer=gnb.nn.Transformer(config),
    )
    chat = gnb.ChatSession(padded, tokenizer, sampling=SAMPLING, cache_length=50, template="none")
    turn = chat.chat("Hello")
    assert all(record.token_id < tokenizer.vocab_size for record in turn.tokens)
    considered = [a for record in turn.tokens for a in record.alternatives]
    unspoken = [a for a in considered if a.token_id >= tokenizer.vocab_size]
    assert unspoken
    assert {(a.probability, a.text.startswith("<row ")) for a in unspoken} == {(0.0, True)}
