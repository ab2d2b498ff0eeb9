"""A reply in the making: from the evidence of each choice to records whose text is certain."""

from __future__ import annotations

import dataclasses
import time

from gemma_nb.chat.events import Alternative, FinishReason, Timing, TokenRecord, Turn
from gemma_nb.chat.stops import StopMatcher
from gemma_nb.sampling.evidence import Evidence
from gemma_nb.sampling.methods import Sampling
from gemma_nb.text.detokenizer import StreamingDetokenizer
from gemma_nb.text.template import Template
from gemma_nb.text.tokenizer import Tokenizer


class Reply:
    """Turns evidence into token records, and ends where the model or a stop string says so.

    Attributes:
      finish_reason: why it ended, None while it goes on.
      finish_detail: the same in a sentence.
      sampling: the settings it is made with.
    """

    def __init__(
        self, turn_id: int, tokenizer: Tokenizer, template: Template, sampling: Sampling
    ) -> None:
        self.finish_reason: FinishReason | None = None
        self.finish_detail = ""
        self._id = turn_id
        self._tokenizer = tokenizer
        self._template = template
        self.sampling = sampling
        self._stop_ids = template.stop_ids(tokenizer)
        self._text = StreamingDetokenizer(tokenizer)
        self._stops = StopMatcher(
            (*template.stop_strings, *sampling.stop), skip_leading_space=template.strip_reply
        )
        self._uncertain: list[TokenRecord] = []
        self._records: list[TokenRecord] = []
        self._ended_by_token = False
        self._count = 0
        self._prompt_tokens = 0
        self._started = self._first = self._last = time.perf_counter()

    def prompt(self, tokens: int) -> None:
        """Notes how many prompt tokens have to be computed."""
        self._prompt_tokens = tokens

    def add(self, evidence: Evidence, position: int) -> list[TokenRecord]:
        """Takes the next choice, of the token at `position`; returns what became certain."""
        self._last = time.perf_counter()
        if self._count == 0:
            self._first = self._last
        record = self._record(evidence, position)
        self._count += 1
        self._uncertain.append(record)
        if record.token_id in self._stop_ids:
            self._ended_by_token = True
            self.finish("stop", f"The model ended its turn with {record.piece}.")
            return self._certain([*self._held_text(), ""])
        certain = self._certain(self._stops.feed(self._text.feed(record.token_id)))
        if self._stops.matched is not None:
            self.finish("stop", f"The stop string {self._stops.matched!r} came.")
        elif self._count >= self.sampling.max_new_tokens:
            limit = self.sampling.max_new_tokens
            self.finish("length", f"The reply reached max_new_tokens ({limit}).")
            certain += self.flush()
        return certain

    def finish(self, reason: FinishReason, detail: str) -> None:
        """Ends the reply; the first reason holds."""
        if self.finish_reason is None:
            self.finish_reason, self.finish_detail = reason, detail

    def flush(self) -> list[TokenRecord]:
        """The records still held back, when no more tokens come."""
        return self._certain(self._held_text()) if self._uncertain else []

    def turn(self) -> Turn:
        """The reply as a turn, as far as it has come."""
        text = "".join(record.text for record in self._records)
        return Turn(
            id=self._id,
            role="model",
            text=text.lstrip() if self._template.strip_reply else text,
            tokens=tuple(self._records),
            ids=self._context_ids(),
            finish_reason=self.finish_reason,
            finish_detail=self.finish_detail,
            timing=Timing(
                prompt_tokens=self._prompt_tokens,
                prefill_seconds=self._first - self._started,
                new_tokens=self._count,
                decode_seconds=self._last - self._first,
            ),
            sampling=self.sampling,
        )

    def _context_ids(self) -> tuple[int, ...]:
        """The reply as it stays in the context: what ended it belongs to the template."""
        ids = [record.token_id for record in self._records]
        if self._ended_by_token:
            return tuple(ids[:-1])
        if self._stops.matched is None:
            return tuple(ids)
        # The stop string may begin inside a token, and text may lag behind the bytes it is made of:
        # keep the tokens that spell the beginning of what is shown, and spell the rest anew.
        shown = "".join(record.text for record in self._records)
        while not shown.startswith(spelled := self._tokenizer.decode(ids)):
            ids.pop()
        return (*ids, *self._tokenizer.encode(shown[len(spelled) :]))

    def _held_text(self) -> list[str]:
        """Text of the uncertain tokens; an unfinished character goes to the last one."""
        rest = self._text.finish()
        texts = self._stops.flush()
        if rest and texts:
            texts[-1] += rest
        elif rest and self._records:
            last = self._records[-1]
            self._records[-1] = dataclasses.replace(last, text=last.text + rest)
        return texts

    def _certain(self, texts: list[str]) -> list[TokenRecord]:
        """The next uncertain records with their `texts`."""
        records = [
            dataclasses.replace(record, text=text)
            for record, text in zip(self._uncertain, texts, strict=False)
        ]
        del self._uncertain[: len(records)]
        self._records += records
        return records

    def _record(self, evidence: Evidence, position: int) -> TokenRecord:
        piece = self._label
        token = int(evidence.token)
        columns = (evidence.ids, evidence.logprobs, evidence.probabilities)
        return TokenRecord(
            index=self._count,
            token_id=token,
            text="",
            piece=piece(token),
            position=position,
            logprob=float(evidence.logprob),
            probability=float(evidence.probability),
            entropy=float(evidence.entropy),
            rank=int(evidence.rank),
            alternatives=tuple(
                Alternative(int(i), piece(int(i)), float(logprob), float(probability))
                for i, logprob, probability in zip(*columns, strict=True)
            ),
        )

    def _label(self, token: int) -> str:
        """What a lone token stands for; some embeddings have rows that stand for none."""
        known = token < self._tokenizer.vocab_size
        return self._tokenizer.token_text(token) if known else f"<row {token}>"
