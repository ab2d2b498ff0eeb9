"""Branching: another reply, message or end of a reply beside one there is, and moving between."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from gemma_nb.chat.continuations import Continuations
from gemma_nb.chat.core import SessionCore
from gemma_nb.chat.events import TokenEvent
from gemma_nb.chat.generation import Generation
from gemma_nb.chat.plans import NewReplies
from gemma_nb.chat.records import TokenRecord
from gemma_nb.chat.replies import Replies
from gemma_nb.chat.tree import ConversationTree
from gemma_nb.chat.turns import Origin, Turn
from gemma_nb.interventions import Intervention
from gemma_nb.sampling.settings import Sampling


class Branching:
    """Adds branches to a session's tree, and shows another one."""

    def __init__(
        self,
        core: SessionCore,
        replies: Replies,
        generation: Generation,
        new: NewReplies,
        continuations: Continuations,
    ) -> None:
        self._tree = core.tree
        self._tokenizer = core.tokenizer
        self._template = core.template
        self._decoder = core.decoder
        self._lock = core.lock
        self._replies = replies
        self._generation = generation
        self._new = new
        self._continuations = continuations

    def new_conversation(self) -> None:
        """Starts over with an empty conversation; the old one stays in `tree`.

        `redo` brings it back as long as nothing else is said.

        Raises:
          BusyError: a reply is being made.
        """
        with self._lock.alone():
            self._tree.hide_after(self._tree.root)

    # --- branching off --------------------------------------------------------------------------

    def regenerate(self, turn: Turn | int | None = None) -> Turn:
        """Makes another reply to a message, beside the one there is.

        With a fixed seed the n-th attempt uses seed + n, so it differs and can be repeated.

        Args:
          turn: a message or a reply to it, on any branch; None for the last one.

        Raises:
          ValueError: nothing was said yet, or the turn is not of this conversation.
        """
        return self._replies.exhaust(self.stream_regenerate(turn))

    def stream_regenerate(self, turn: Turn | int | None = None) -> Iterator[TokenEvent]:
        """`regenerate`, token by token."""
        self._lock.refuse_if_busy()
        if turn is None and not self._tree.turns:
            raise ValueError("there is no reply to regenerate: send a message first")
        node = self._tree.tip if turn is None else self._tree.find(turn)

        asked = node.asked if node.role == "model" else node
        beside = node if asked is not node else asked.shown or asked.newest
        origin = None if beside is None else Origin("regenerate", beside.id)
        return self._replies.start(lambda: self._new.reply(asked, origin))

    def fork(
        self,
        at: TokenRecord | int,
        with_token: int | str | None = None,
        *,
        turn: Turn | int | None = None,
        sampling: Sampling | None = None,
    ) -> Turn:
        """Makes another end of a reply, from some token on.

        The new reply stands beside the old one, begins with the same tokens and their evidence,
        and computes nothing of them again.

        - With a token (or a text, which may be several): it takes the place of the one at `at`.
          The new reply has the seed of the old one, and so the same random key in each place: it
          differs only by what was put there, and repeats the old one if that is the same token.
        - Without: the token stays and what follows is drawn with a seed of its own.  At the token
          that ended the reply, that end is refused once and the reply goes on.

        At most `max_new_tokens` are drawn, not counting those that stand already.

        Args:
          at: a token of any reply on any branch, or the event that told of it; or, with `turn`, its
            index.
          with_token: a token id, or a text.
          turn: the reply, where it is not clear from `at`; None with an index: the last reply.
          sampling: settings in place of the session's; a seed in it is used as it is.

        Raises:
          ValueError: no such token or turn, or an id or text that stands for no token of a reply.
        """
        return self._replies.exhaust(self.stream_fork(at, with_token, turn=turn, sampling=sampling))

    def stream_fork(
        self,
        at: TokenRecord | int,
        with_token: int | str | None = None,
        *,
        turn: Turn | int | None = None,
        sampling: Sampling | None = None,
    ) -> Iterator[TokenEvent]:
        """`fork`, token by token, from the first that is not certain yet; see `partial`."""
        self._lock.refuse_if_busy()
        node, index = self._tree.token(at, turn)
        given = self._given(with_token)
        return self._replies.start(lambda: self._continuations.fork(node, index, given, sampling))

    def intervene(
        self,
        *interventions: Intervention,
        at: TokenRecord | int = 0,
        turn: Turn | int | None = None,
        sampling: Sampling | None = None,
    ) -> Turn:
        """Makes a reply once more while the model is changed, from some token on.

            chat.intervene(gnb.AblateHeads({5: [1]}), at=12)

        The new reply stands beside the old one, the baseline, with the same tokens before `at`, the
        same seed and so the same random key in each place: whatever differs is what the
        interventions do.  They act from the position that chooses the token at `at` on; what is
        cached before it is used as it is.  `Turn.interventions` lists them, and `trace` of the turn
        is computed under them.  Later messages are answered by the session's own model again.

        Args:
          *interventions: see `gemma_nb.interventions`.
          at: a token of the reply, or its index.
          turn: the reply; None is that of `at`, or the last one.
          sampling: settings in place of the reply's; a seed in it is used as it is.

        Raises:
          ValueError: no interventions, no such token or turn, or something that the model does not
            have.
        """
        if not interventions:
            raise ValueError("name at least one intervention, such as gnb.AblateHeads({5: [1]})")
        self._lock.refuse_if_busy()
        node, index = self._tree.token(at, turn)
        return self._replies.exhaust(
            self._replies.start(
                lambda: self._continuations.intervene(node, index, interventions, sampling)
            )
        )

    def edit(self, turn: Turn | int, text: str) -> Turn:
        """Says something else in the place of a turn, on a branch of its own.

        A message is sent again with the new text, and the new reply returned.  A reply gets the new
        text: tokens that it shares with the old one keep their evidence, the others get that of
        having been chosen there; `resume` goes on from it.

        Args:
          turn: of any branch.
          text: the new text.

        Raises:
          ValueError: the turn is not of this conversation.
          ContextFullError: also where the new text of a reply does not fit.
        """
        node = self._tree.find(turn)
        if node.role == "user":
            return self._replies.exhaust(self.stream_edit(turn, text))
        self.check_text(text)
        with self._lock.alone():
            plan = self._continuations.edited(node, text)
            reply = self._generation.begin(plan, self._tree.new_id())
            reply.adopt_prefix(plan.prefix + plan.given)
            reply.finish("edited", "You wrote this.")
            reply.flush()
            reply.used = len(plan.all_ids)
            self._tree.add(plan.parent, reply.turn())
        return self._tree.turns[-1]

    def stream_edit(self, turn: Turn | int, text: str) -> Iterator[TokenEvent]:
        """`edit` of a message, token by token of the new reply.

        Raises:
          ValueError: the turn is a reply: call `edit`, then `stream_resume`.
        """
        self.check_text(text)
        node = self._tree.find(turn)
        if node.role != "user" or node.parent is None:
            raise ValueError(
                "stream_edit() sends a message again; for a reply call edit(), and then "
                "stream_resume() to let it go on"
            )
        parent = node.parent
        return self._replies.start(
            lambda: self._new.message(self._tree, parent, text, Origin("edit", node.id))
        )

    def resume(self, turn: Turn | int | None = None, *, sampling: Sampling | None = None) -> Turn:
        """Goes on with a reply that was stopped, interrupted, edited, or ended too early.

        The old reply stays beside the new one, which begins with the same text.  Its seed is that
        of the old one: a stopped reply goes on exactly as it would have.  Where the model had come
        to its end, that end is refused once.

        Args:
          turn: a reply of any branch; None for the last one.
          sampling: settings in place of the session's; a seed in it is used as it is.

        Raises:
          ValueError: there is no reply, or the turn is not one.
        """
        return self._replies.exhaust(self.stream_resume(turn, sampling=sampling))

    def stream_resume(
        self, turn: Turn | int | None = None, *, sampling: Sampling | None = None
    ) -> Iterator[TokenEvent]:
        """`resume`, token by token, from the first that is not certain yet; see `partial`."""
        self._lock.refuse_if_busy()
        node = self._tree.reply(turn)
        return self._replies.start(lambda: self._continuations.resume(node, sampling))

    # --- moving about ---------------------------------------------------------------------------

    def undo(self) -> tuple[Turn, ...]:
        """Takes the last message and its reply back; returns them.  They stay in `tree`.

        Raises:
          ValueError: nothing was said.
        """
        with self._lock.alone():
            hidden = self._tree.undo()
        return hidden

    def redo(self) -> tuple[Turn, ...]:
        """Brings back what the last `undo` took; returns it.

        Raises:
          ValueError: nothing was undone, or something else was said since.
        """
        with self._lock.alone():
            shown = self._tree.redo()
        return shown

    def select(self, branch: Turn | int) -> tuple[Turn, ...]:
        """Shows the branch of a turn, and what was last shown after it; returns `turns`.

        Raises:
          ValueError: the turn is not of this conversation.
        """
        node = self._tree.find(branch)
        with self._lock.alone():
            self._tree.select(node)
        return self._tree.turns

    def adopt(self, tree: ConversationTree) -> None:
        """Goes on with another conversation's tree in place of this one's.

        Raises:
          BusyError: a reply is being made.
        """
        with self._lock.alone():
            self._tree.adopt(tree)

    # --- repeating -------------------------------------------------------------------------------

    def replay(self, turn: Turn | int | None = None) -> Turn:
        """Makes a reply once more with the random keys that it was made with.

        Nothing is added to the tree.  What is cached of the text before it is used as it is: then
        the tokens and all of their evidence come out the same, bit for bit.  What had to be
        computed anew since may differ in the last bits of a rounding.

        Args:
          turn: a reply of any branch; None for the last one.

        Raises:
          ValueError: none of the turn's tokens was drawn.
        """
        node = self._tree.reply(turn)
        source = node.said
        with self._lock.alone():
            self._generation.stop.clear()
            plan = self._continuations.replay(node)
            reply = self._generation.begin(plan, source.id)
            # The same pieces of the prompt in the same compiled steps.
            ids = plan.all_ids
            self._decoder.rewind_to(ids[: len(ids) - source.timing.prompt_tokens])
            for _ in self._generation.run(plan, reply):
                pass
            reply.flush()
        made = dataclasses.replace(reply.turn(), sampling=source.sampling)
        if len(made.tokens) < len(source.tokens):
            return made
        # It ends there because the other one did.
        return dataclasses.replace(
            made, finish_reason=source.finish_reason, finish_detail=source.finish_detail
        )

    # --- internals ------------------------------------------------------------------------------

    def check_text(self, text: object) -> None:
        """Refuses a message that is no text or cannot be tokenized, or that comes too early."""
        if not isinstance(text, str):
            raise TypeError(f"a message must be a string, got {type(text).__name__}")
        self._tokenizer.encode(text)
        self._lock.refuse_if_busy()

    def _given(self, with_token: int | str | None) -> tuple[int, ...] | None:
        """The tokens to put there, checked."""
        if with_token is None:
            return None
        if isinstance(with_token, str):
            if not with_token:
                raise ValueError("with_token is an empty text: give a token, or None to keep it")
            return tuple(self._tokenizer.encode(with_token))
        token = int(with_token)
        never = self._template.forbidden_ids(self._tokenizer)
        if not 0 <= token < self._tokenizer.vocab_size or token in never:
            raise ValueError(f"token id {with_token} stands for nothing that a reply can hold")
        return (token,)
