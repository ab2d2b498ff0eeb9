"""Random sequences of everything that can be done to a conversation, on the tiny model.

After each operation every reply on the active path agrees with a pass over its whole context, the
cache computes what a pass from nothing computes, and nothing is lost from the tree.

GEMMA_NB_SEQUENCES is the number of sequences.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import hypothesis
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import gemma_nb as gnb
from gemma_nb.errors import ContextFullError
from tests.chat.checks import assert_parity

SEQUENCES = int(os.environ.get("GEMMA_NB_SEQUENCES", "30"))
OPERATIONS = 8

TEXTS = st.sampled_from(["Hi", "", "more é", "longer than the window of eight", "中"])
STOPS = st.none() | st.integers(0, 5)
SEEDS = st.integers(0, 3)


class Operations(RuleBasedStateMachine):
    """A conversation, and what was said in it so far."""

    model: gnb.GemmaTransformer
    tokenizer: gnb.text.tokenizer.Tokenizer
    score: staticmethod

    @initialize(
        template=st.sampled_from(["none", "gemma"]),
        when_full=st.sampled_from(["stop", "drop_oldest", "error"]),
        system=st.sampled_from(["", "Be kind."]),
        temperature=st.sampled_from([0.0, 1.0]),
    )
    def begin(self, temperature, **kwargs):
        sampling = gnb.Sampling(seed=1, max_new_tokens=6, temperature=temperature)
        # One length, so that all sequences run the same compiled programs; some fill it.
        kwargs |= {"sampling": sampling, "cache_length": 120}
        self.chat = gnb.ChatSession(self.model, self.tokenizer, **kwargs)
        self.seen = {}
        self.checked = set()

    # --- operations -----------------------------------------------------------------------------

    @rule(text=TEXTS, stop=STOPS)
    def send(self, text, stop):
        self.read(lambda: self.chat.stream(text), stop)

    @precondition(lambda self: self.replies())
    @rule(data=st.data(), stop=STOPS)
    def fork(self, data, stop):
        turn = data.draw(st.sampled_from(self.replies()), "turn")
        at = data.draw(st.sampled_from(turn.tokens), "at")
        tokens = [a.token_id for a in at.alternatives if a.token_id > 5]
        some = st.sampled_from(tokens) | st.integers(6, 260) | st.sampled_from(["né", "\n"])
        stops = st.sampled_from(sorted(self.chat.template.stop_ids(self.tokenizer)))
        token = data.draw(st.none() | some | stops, "token")
        self.read(lambda: self.chat.stream_fork(at, token, turn=turn), stop)

    @precondition(lambda self: self.said("user"))
    @rule(data=st.data(), text=TEXTS, stop=STOPS)
    def edit_message(self, data, text, stop):
        turn = data.draw(st.sampled_from(self.said("user")), "turn")
        self.read(lambda: self.chat.stream_edit(turn, text), stop)

    @precondition(lambda self: self.said("model"))
    @rule(data=st.data(), text=TEXTS)
    def edit_reply(self, data, text):
        turn = data.draw(st.sampled_from(self.said("model")), "turn")
        more = data.draw(st.sampled_from(["", "".join(r.text for r in turn.tokens[:3])]), "kept")
        try:
            edited = self.chat.edit(turn, more + text)
        except ContextFullError:
            return
        assert edited.ids == tuple(r.token_id for r in edited.tokens)

    @precondition(lambda self: self.said("user"))
    @rule(data=st.data(), stop=STOPS)
    def regenerate(self, data, stop):
        turn = data.draw(st.none() | st.sampled_from(list(self.chat.tree)), "turn")
        if turn is not None or self.chat.turns:
            self.read(lambda: self.chat.stream_regenerate(turn), stop)

    @precondition(lambda self: self.said("model"))
    @rule(data=st.data(), stop=STOPS)
    def resume(self, data, stop):
        turn = data.draw(st.sampled_from(self.said("model")), "turn")
        self.read(lambda: self.chat.stream_resume(turn), stop)
        made = self.chat.turns[-1]
        if made.origin is not None and made.origin.turn == turn.id:
            shown = turn.text.rstrip("\ufffd")
            assert made.text.startswith(shown[: len(made.text)])

    @precondition(lambda self: self.chat.turns)
    @rule()
    def undo_and_redo(self):
        before = self.chat.turns
        hidden = self.chat.undo()
        assert self.chat.turns == before[: -len(hidden)]
        self.chat.redo()
        assert self.chat.turns == before

    @precondition(lambda self: self.chat.turns)
    @rule()
    def undo(self):
        self.chat.undo()

    @precondition(lambda self: self.said("user"))
    @rule(data=st.data())
    def select(self, data):
        turn = data.draw(st.sampled_from(list(self.chat.tree)), "turn")
        assert turn in self.chat.select(turn)
        if self.chat.turns[-1].role == "user":
            # A message without a reply: the conversation goes on with one.
            self.chat.undo()

    @rule()
    def start_over(self):
        self.chat.new_conversation()

    @precondition(lambda self: self.replies())
    @rule(data=st.data())
    def replay(self, data):
        turn = data.draw(st.sampled_from(self.replies()), "turn")
        drawn = [record for record in turn.tokens if record.key is not None]
        if turn.finish_reason == "edited" or not drawn or drawn[-1] is not turn.tokens[-1]:
            return
        again = self.chat.replay(turn)
        assert [r.token_id for r in again.tokens] == [r.token_id for r in turn.tokens]
        assert [r.key for r in again.tokens] == [r.key for r in turn.tokens]

    @precondition(lambda self: self.replies())
    @rule(data=st.data(), how=st.sampled_from(["look", "lens", "trace", "trace all"]))
    def look_inside(self, data, how):
        """Whatever is looked at, of the reply that is there or of another one."""
        turn = data.draw(st.just(self.replies()[-1]) | st.sampled_from(self.replies()), "turn")
        held = list(self.chat._decoder.ids)
        if how == "trace":
            self.chat.trace(turn, sites=())
        elif how == "trace all":
            attention = self.chat.trace(turn, layers=[0, 2]).attention.values
            np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-5)
        else:
            record = data.draw(st.sampled_from(turn.tokens), "at")
            expected = self.score(self.chat.tokens(turn))[record.position - 1]
            lens = self.chat.lens(record.index, turn=turn)
            found = lens.watched_logprob.values.reshape(-1)[-1]
            np.testing.assert_allclose(found, expected[record.token_id], atol=5e-5)
        assert self.chat._decoder.ids == held

    @precondition(lambda self: self.said("model"))
    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "conversation.gnb"
            self.chat.save(path)
            loaded = gnb.ChatSession.load(path, self.model, self.tokenizer)
        assert loaded.turns == self.chat.turns
        assert loaded.sampling == self.chat.sampling
        assert (loaded.system, loaded.when_full) == (self.chat.system, self.chat.when_full)
        self.chat = loaded

    # --- what holds after each --------------------------------------------------------------------

    def teardown(self):
        if hasattr(self, "chat"):
            self.check()

    def check_invariants(self, *args, **kwargs):
        super().check_invariants(*args, **kwargs)
        if hasattr(self, "chat"):
            self.check()

    def check(self):
        chat = self.chat
        assert not chat.busy
        assert chat.partial is None
        self.nothing_is_lost()
        for turn in chat.turns:
            if turn.role == "model" and turn.id not in self.checked:
                self.checked.add(turn.id)
                assert turn.context.used <= chat.cache_length
                assert_parity(chat, turn, self.score)
        self.the_cache_is_right()

    def nothing_is_lost(self):
        tree = self.chat.tree
        now = {node.id: (node.turn, node.parent.id) for node in tree.nodes() if node.parent}
        assert self.seen.items() <= now.items() or all(
            now[id_] == before for id_, before in self.seen.items()
        )
        self.seen = now
        for node in tree.nodes():
            assert [child.id for child in node.children] == sorted(c.id for c in node.children)

    def the_cache_is_right(self):
        """The next token's distribution, from the cache, is that of a pass from nothing."""
        chat = self.chat
        ids = chat.tokens(chat.turns[-1]) if chat.turns else chat._core.contexts.opening("")
        ids = ids[: chat.cache_length]
        held = chat._decoder.ids
        rest = chat._decoder.begin(ids, gnb.Sampling(seed=0))
        shared = len(ids) - len(rest)
        assert ids[:shared] == held[:shared]
        evidence = chat._decoder.prefill(rest)
        row = self.score(ids)[-1]
        np.testing.assert_allclose(evidence.logprobs, row[evidence.ids], atol=2e-5)

    # --- helpers --------------------------------------------------------------------------------

    def read(self, start, stop):
        """Reads a reply, and stops it after `stop` tokens."""
        before = len(self.chat.tree)
        try:
            for count, _ in enumerate(start()):
                if count == stop:
                    self.chat.stop()
        except ContextFullError:
            assert len(self.chat.tree) == before or self.chat.when_full == "error"
            return
        assert len(self.chat.tree) > before
        assert self.chat.turns[-1].role == "model"

    def said(self, role):
        return [turn for turn in self.chat.tree if turn.role == role]

    def replies(self):
        return [turn for turn in self.chat.tree if turn.tokens]


def test_any_sequence_of_operations(tiny_model, score, monkeypatch):
    monkeypatch.setattr("gemma_nb.interp.passes.WORTH", 8)  # what replying has computed is used
    model, tokenizer = tiny_model
    fields = {"model": model, "tokenizer": tokenizer, "score": staticmethod(score)}
    machine = type("Machine", (Operations,), fields)
    hypothesis.stateful.run_state_machine_as_test(
        machine,
        settings=hypothesis.settings(
            max_examples=SEQUENCES,
            stateful_step_count=OPERATIONS,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
