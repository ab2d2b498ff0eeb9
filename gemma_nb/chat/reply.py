"""A reply in the making: from the evidence of each choice to records whose text is certain."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time

from gemma_nb.chat.records import TokenRecord, token_record
from gemma_nb.chat.stops import StopMatcher
from gemma_nb.chat.tokens import GrowingTokens, Tokens
from gemma_nb.chat.turns import Context, FinishReason, Origin, Timing, Turn
from gemma_nb.interventions import Interventions
from gemma_nb.interventions.reach import unreached
from gemma_nb.sampling.evidence import Evidence
from gemma_nb.sampling.settings import Sampling
from gemma_nb.text.detokenizer import StreamingDetokenizer
from gemma_nb.text.template import Template
from gemma_nb.text.tokenizer import Tokenizer


class Reply:
    """Turns evidence into token records, and ends where the model or a stop string says so.

    Attributes:
      finish_reason: why it ended, None while it goes on.
      finish_detail: the same in a sentence.
      sampling: the settings it is made with.
      context: what it is made in.
      used: positions of the context in use.
    """

    def __init__(
        self,
        turn_id: int,
        tokenizer: Tokenizer,
        template: Template,
        sampling: Sampling,
        *,
        origin: Origin | None = None,
        context: Context | None = None,
        under: Interventions | None = None,
    ) -> None:
        self.finish_reason: FinishReason | None = None
        self.finish_detail = ""
        self.sampling = sampling
        self.context = context or Context()
        self.used = 0
        self._id = turn_id
        self._tokenizer = tokenizer
        self._template = template
        self._origin = origin
        self._under = under
        self._stop_ids = template.stop_ids(tokenizer)
        self._text = StreamingDetokenizer(tokenizer)
        self._stops = StopMatcher(
            (*template.stop_strings, *sampling.stop), skip_leading_space=template.strip_reply
        )
        self._uncertain: list[TokenRecord] = []
        self._tokens = GrowingTokens()
        self._ended_by_token = False
        self._count = 0  # tokens, of which
        self._drawn = 0
        self._prompt_tokens = 0
        self._started = self._first = self._last = time.perf_counter()

    def prompt(self, tokens: int) -> None:
        """Notes how many prompt tokens have to be computed."""
        self._prompt_tokens += tokens

    def adopt_prefix(self, tokens: Tokens) -> None:
        """Takes over tokens that stand already, with their evidence; they do not end the reply."""
        texts = [self._text.feed(token) for token in tokens.token_id.tolist()]
        self._count += len(tokens)
        certain = self._stops.resume(texts)
        # Siblings share the rows of what they have in common.
        pairs = zip(certain, tokens.text.tolist(), strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._tokens.extend(tokens[:same])
        self._uncertain.extend(tokens[same:])
        self._certain(certain[same:])

    @property
    def one_left(self) -> bool:
        """Whether the next choice is the last one, whatever it will be."""
        return self._drawn + 1 >= self.sampling.max_new_tokens

    def give(self, record: TokenRecord) -> list[TokenRecord]:
        """Takes a token that the user put there; returns what became certain."""
        return self._take(record)

    def add(
        self, evidence: Evidence, position: int, key: tuple[int, int] | None = None
    ) -> list[TokenRecord]:
        """Takes the next choice, of the token at `position`; returns what became certain."""
        self._last = time.perf_counter()
        if self._drawn == 0:
            self._first = self._last
        self._drawn += 1
        certain = self._take(
            token_record(self._tokenizer, evidence, index=self._count, position=position, key=key)
        )
        limit = self.sampling.max_new_tokens
        if self.finish_reason is None and self._drawn >= limit:
            self.finish("length", f"The reply reached max_new_tokens ({limit}).")
            certain += self.flush()
        return certain

    def _take(self, record: TokenRecord) -> list[TokenRecord]:
        self._count += 1
        self._uncertain.append(record)
        if record.token_id in self._stop_ids:
            self._ended_by_token = True
            self.finish("stop", f"The model ended its turn with {record.piece}.")
            return self._certain([*self._held_text(), ""])
        certain = self._certain(self._stops.feed(self._text.feed(record.token_id)))
        if self._stops.matched is not None:
            self.finish("stop", f"The stop string {self._stops.matched!r} came.")
        return certain

    def finish(self, reason: FinishReason, detail: str) -> None:
        """Ends the reply; the first reason holds."""
        if self.finish_reason is None:
            self.finish_reason, self.finish_detail = reason, detail

    def flush(self) -> list[TokenRecord]:
        """The records still held back, when no more tokens come."""
        return self._certain(self._held_text()) if self._uncertain else []

    @property
    def unreached(self) -> tuple[str, ...]:
        """Sentences on the interventions that the finished reply did not reach."""
        if self.finish_reason is None:
            return ()
        return tuple(f"{each}." for each in unreached(self._under, self.used))

    def turn(self) -> Turn:
        """The reply as a turn, as far as it has come."""
        tokens = self._tokens.tokens
        text = "".join(tokens.text.tolist())
        return Turn(
            id=self._id,
            role="model",
            text=text.lstrip() if self._template.strip_reply else text,
            tokens=tokens,
            ids=self._context_ids(tokens.token_id.tolist(), text),
            finish_reason=self.finish_reason,
            finish_detail="  ".join([*filter(None, [self.finish_detail]), *self.unreached]),
            timing=Timing(
                prompt_tokens=self._prompt_tokens,
                prefill_seconds=self._first - self._started,
                new_tokens=self._drawn,
                decode_seconds=self._last - self._first,
            ),
            sampling=self.sampling,
            origin=self._origin,
            context=dataclasses.replace(self.context, used=self.used),
            interventions=() if self._under is None else self._under.describe(),
        )

    def _context_ids(self, ids: list[int], shown: str) -> tuple[int, ...]:
        """The reply as it stays in the context: what ended it belongs to the template.

        Args:
          ids: of its tokens.
          shown: its text.
        """
        if self._ended_by_token:
            return tuple(ids[:-1])
        if self._stops.matched is None:
            return tuple(ids)
        # The stop string may begin inside a token, and text may lag behind the bytes it is made of:
        # keep the tokens that spell the beginning of what is shown, and spell the rest anew.
        while not shown.startswith(spelled := self._tokenizer.decode(ids)):
            ids.pop()
        return (*ids, *self._tokenizer.encode(shown[len(spelled) :]))

    def _held_text(self) -> list[str]:
        """Text of the uncertain tokens; an unfinished character goes to the last one."""
        rest = self._text.finish()
        texts = self._stops.flush()
        if rest and texts:
            texts[-1] += rest
        elif rest and (tokens := self._tokens.tokens):
            last = tokens[-1]
            self._tokens.replace_last(dataclasses.replace(last, text=last.text + rest))
        return texts

    def _certain(self, texts: list[str]) -> list[TokenRecord]:
        """The next uncertain records with their `texts`."""
        records = [
            # A conversation repeats few texts many times.
            dataclasses.replace(record, text=sys.intern(text))
            for record, text in zip(self._uncertain, texts, strict=False)
        ]
        del self._uncertain[: len(records)]
        self._tokens.extend(records)
        return records
