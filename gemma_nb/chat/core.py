"""The core of a session: state that several of its parts work on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gemma_nb import settings
from gemma_nb.chat.context import Contexts
from gemma_nb.chat.interventions import ReplyInterventions
from gemma_nb.chat.lock import SessionLock
from gemma_nb.chat.reply_settings import ReplySettings
from gemma_nb.chat.tree import ConversationTree
from gemma_nb.expected import expect
from gemma_nb.interventions.reach import warn_of_unreached
from gemma_nb.model import GemmaTransformer
from gemma_nb.sampling.decode import Decoder
from gemma_nb.sampling.rows import AttentionRows
from gemma_nb.sampling.settings import Capture, Sampling
from gemma_nb.sampling.traits import EngineTraits
from gemma_nb.text.template import Template, resolve_template
from gemma_nb.text.tokenizer import Tokenizer

LENGTH = 4096  # positions of context, unless a session says otherwise


@dataclasses.dataclass(frozen=True)
class SessionCore:
    """Model, texts and state that the parts of one session share.

    Attributes:
      model: what computes.
      tokenizer: what reads and writes text.
      template: how turns become tokens.
      capture: what evidence each token keeps.
      settings: those of the next reply.
      tree: all branches.
      lock: lets one operation run at a time.
      rows: attention rows of tokens.
      decoder: draws tokens, and holds the key-value cache.
      contexts: turns as token ids.
      made_under: interventions of each reply.
    """

    model: GemmaTransformer
    tokenizer: Tokenizer
    template: Template
    capture: Capture
    settings: ReplySettings
    tree: ConversationTree
    lock: SessionLock
    rows: AttentionRows
    decoder: Decoder
    contexts: Contexts
    made_under: ReplyInterventions

    @classmethod
    def of(
        cls,
        model: GemmaTransformer,
        tokenizer: Tokenizer,
        *,
        system: str | None,
        sampling: Sampling | Mapping[str, Any] | None,
        cache_length: int | None,
        capture: Capture | Mapping[str, Any] | None,
        template: str | Template | None,
        when_full: str | None,
    ) -> SessionCore:
        """The core of an empty session, its arguments checked; see `ChatSession`."""
        way = "gnb.ChatSession(model, tokenizer), both from gnb.load(...)"
        expect(model, GemmaTransformer, "model", way)
        if not hasattr(tokenizer, "token_text"):
            expect(tokenizer, Tokenizer, "tokenizer", way)
        config, info = model.config, model.info
        length = settings.whole("cache_length", LENGTH if cache_length is None else cache_length)
        if not 2 <= length <= config.max_context:
            raise ValueError(
                f"cache_length must lie in 2 to {config.max_context} (the model's context), "
                f"got {length}"
            )
        room = "there is room for {} tokens (cache_length)"
        warn_of_unreached(model.interventions, length, room)
        own = info.chat_templates if info else None
        chosen = resolve_template(template, info.tuning if info else "base", own, tokenizer)
        evidence = settings.record(Capture, "capture", {} if capture is None else capture)
        evidence = evidence.resolved(config.num_layers)
        lock, tree = SessionLock(), ConversationTree()
        replying = ReplySettings(
            *(tokenizer, chosen, config.num_embed, lock),
            sampling=Sampling.given(sampling) or Sampling.recommended(model),
            system=system,
            when_full="stop" if when_full is None else when_full,
        )
        rows = AttentionRows(evidence, model, tokenizer, shown=EngineTraits.of(model).can_capture)
        return cls(
            *(model, tokenizer, chosen, evidence, replying, tree, lock, rows),
            decoder=Decoder(model, limit=length, top_k=evidence.top_k, rows=rows),
            contexts=Contexts(tokenizer, chosen, length),
            made_under=ReplyInterventions(model, tree),
        )
