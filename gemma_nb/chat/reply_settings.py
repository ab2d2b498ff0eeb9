"""Settings that the next reply is made with, and the seeds that come of them."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any

from gemma_nb import settings
from gemma_nb.chat.context import WhenFull, check_policy
from gemma_nb.chat.lock import SessionLock
from gemma_nb.chat.node import Node
from gemma_nb.chat.turns import Turn
from gemma_nb.sampling.settings import Sampling
from gemma_nb.text.template import Template
from gemma_nb.text.tokenizer import Tokenizer


class ReplySettings:
    """Sampling, system text and the policy for a full context, as the user sets them.

    Attributes:
      template: how turns become tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        num_embed: int,
        lock: SessionLock,
        *,
        sampling: Sampling,
        system: str | None,
        when_full: str,
    ) -> None:
        """Checks the settings; see `ChatSession`.

        Args:
          tokenizer: of the model.
          template: how turns become tokens.
          num_embed: rows of the model's embedding.
          lock: of the session.
          sampling: how the next reply is sampled.
          system: text before the conversation; None takes the template's own.
          when_full: the policy for a full context.
        """
        self.template = template
        self._tokenizer = tokenizer
        self._lock = lock
        self._never = (
            *template.forbidden_ids(tokenizer),
            # Some embeddings have rows that stand for no token.
            *range(tokenizer.vocab_size, num_embed),
        )
        self._sampling = sampling
        self._system = self._checked_system(template.default_system if system is None else system)
        self._when_full = check_policy(when_full)

    @property
    def sampling(self) -> Sampling:
        """How the next reply is sampled."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling | Mapping[str, Any]) -> None:
        given = Sampling.given(sampling)
        if given is None:
            settings.refuse("sampling", "a gnb.Sampling or a mapping of its fields", sampling)
        self._sampling = given

    @property
    def system(self) -> str | None:
        """The text that the model is given before the conversation."""
        return self._system

    @system.setter
    def system(self, system: str | None) -> None:
        checked = self._checked_system(system)
        with self._lock.alone():
            self._system = checked

    @property
    def when_full(self) -> WhenFull:
        """The policy for a full context."""
        return self._when_full

    @when_full.setter
    def when_full(self, when_full: WhenFull) -> None:
        policy = check_policy(when_full)
        with self._lock.alone():
            self._when_full = policy

    def _checked_system(self, system: object) -> str | None:
        """The system text, unless it is none, cannot be tokenized, or the template refuses it."""
        if not isinstance(system, str | None):
            settings.refuse("system", "a string or None", system)
        self._tokenizer.encode(system or "")
        self.template.check_system(system)
        return system

    def barred(self, sampling: Sampling, *, also: frozenset[int] = frozenset()) -> Sampling:
        """`sampling` without the tokens that never belong into a reply."""
        forbidden = (*sampling.forbidden, *self._never, *also)
        return dataclasses.replace(sampling, forbidden=forbidden)

    def seeded(self, asked: Node) -> Sampling:
        """The settings, with a seed of this attempt's own to reply to a message."""
        seed = self.sampling.seed
        chosen = secrets.randbits(31) if seed is None else (seed + len(asked.children)) % 2**32
        return dataclasses.replace(self.sampling, seed=chosen)

    def with_seed_of(self, source: Turn, sampling: Sampling | None) -> Sampling:
        """Settings with the seed of another reply: each place draws with the key it had."""
        sampling = Sampling.given(sampling)
        chosen = sampling or self.sampling
        if sampling is not None and sampling.seed is not None:
            return chosen
        seed = source.sampling.seed if source.sampling else self.sampling.seed
        return dataclasses.replace(chosen, seed=secrets.randbits(31) if seed is None else seed)

    def with_own_seed(self, asked: Node, sampling: Sampling | None) -> Sampling:
        """Settings with a seed of their own, for another reply to a message."""
        sampling = Sampling.given(sampling)
        if sampling is None:
            return self.seeded(asked)
        seed = secrets.randbits(31) if sampling.seed is None else sampling.seed
        return dataclasses.replace(sampling, seed=seed)
