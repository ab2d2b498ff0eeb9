"""Inspection of a conversation: differences, traces, single tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from gemma_nb.chat import diff as diffs
from gemma_nb.chat.core import SessionCore
from gemma_nb.chat.plans import NewReplies
from gemma_nb.chat.records import TokenRecord
from gemma_nb.chat.scoring import Scorer
from gemma_nb.chat.speakers import speakers
from gemma_nb.chat.turns import Turn
from gemma_nb.errors import BusyError
from gemma_nb.indices import Indices
from gemma_nb.model import GemmaTransformer
from gemma_nb.sampling.inspect_position import InspectedPosition
from gemma_nb.sites import SITES

if TYPE_CHECKING:
    import xarray

    from gemma_nb.interp.passes import Pass
    from gemma_nb.interp.trace import Trace

# Sites that are shown of one token.
_SITES = ("attention", "residual", "final")


class Inspector:
    """Computes what happened inside the model where the turns of a session were made."""

    def __init__(self, core: SessionCore, new: NewReplies, scorer: Scorer) -> None:
        self._core = core
        self._tree = core.tree
        self._decoder = core.decoder
        self._new = new
        self._scorer = scorer
        # The last turn that was inspected, and its trace with nothing computed.
        self._inspected: tuple[Turn, Trace] | None = None

    def diff(self, a: Turn | int, b: Turn | int) -> diffs.Diff:
        """Two branches side by side from where they part.

        Each token comes with its log-probability where it stands, and with that in the place of
        the other branch: after the other's token where two replies part, after the other's message
        where two messages do.  Both are computed by the plain forward pass.

        Args:
          a: a turn of one branch.
          b: a turn of the other.

        Raises:
          ValueError: both turns stand on one branch.
        """
        return diffs.compare(
            *(self._core.contexts, self._scorer, self._core.made_under),
            self._tree.find(a),
            self._tree.find(b),
        )

    def trace(
        self,
        turn: Turn | None = None,
        *,
        sites: Sequence[str] = ("attention",),
        layers: Indices = None,
    ) -> Trace:
        """Computes what happened inside the model up to and including a turn.

        It is what the plain forward pass over the whole context of that turn computes, in the
        precision of the model's parameters, under the interventions that the turn was made under;
        positions are those of the turn's token records.  The residual stream that replying has
        computed, as exactly, is taken over where the session still holds it (its last branch, up to
        192 MB, some 4,000 tokens of the default model; not with int8): then only what is asked for
        is computed.

        Args:
          turn: a turn of any branch; None is the last reply.
          sites: see `gnb.list_sites`.
          layers: None for all.

        Raises:
          ValueError: no such turn, site or layer.
        """
        from gemma_nb.interp.trace import captured

        node = self._tree.reply() if turn is None else self._tree.find(turn)
        ids, last, model = self._new.ids_of(node), node.said, self._core.model
        if last.role == "model":
            model = model.replace(interventions=self._core.made_under.of(last))
        source = self._source(model, ids)
        turns, roles = speakers(
            self._core.contexts, self._core.tokenizer, node.turns, last.context, ids
        )
        made = captured(
            *(model, np.asarray(ids, np.int32), self._core.tokenizer),
            sites=sites,
            layers=layers,
            turns=turns,
            roles=roles,
        )
        assert made.source is source
        return made

    def tokens(self, turn: Turn | int | None = None) -> list[int]:
        """The token ids of the context up to and including a turn (None: the last reply).

        Those of a reply are what it was made in: positions are those of its token records.

        Raises:
          ValueError: the turn is not of this conversation, or there is none.
        """
        return self._new.ids_of(self._tree.reply() if turn is None else self._tree.find(turn))

    def look(self, at: TokenRecord | int, *, turn: Turn | int | None = None) -> Trace:
        """Computes what the model computed where it chose a token of a reply.

        The trace is that of `trace`, and holds the attention weights of all layers, the residual
        stream after each layer and the final states at a single position: that of the token before
        the one at `at`.  Other sites and positions are computed when they are asked for, by a pass.

        While the key-value cache holds the text up to there, as it does on the branch that was
        talked on last, that is a pass over one token, from the weights that decoding runs on.
        Otherwise, and while a reply is being made, it is the plain pass over the whole context.

        Args:
          at: a token of any reply, or the event that told of it, or its index.
          turn: the reply, where it is not clear from `at`; None with an index: the last reply.

        Raises:
          ValueError: no such token or turn.
        """
        from gemma_nb.interp.labels import dims_of

        node, index = self._tree.token(at, turn)
        last = node.said
        if self._inspected is None or self._inspected[0] is not last:
            self._inspected = last, self.trace(last, sites=())
        trace = self._inspected[1]
        position = int(last.tokens.position[index]) - 1
        found = self._inspect_position(last, trace.tokens.tolist(), position)
        if found is None:
            data = {site: trace.get(site, positions=position) for site in _SITES}
            return dataclasses.replace(trace, data=data)
        # Nothing that comes later is seen.
        seen = np.zeros((*found.attention.shape[:2], 1, len(trace.tokens)), np.float32)
        seen[:, :, 0, : position + 1] = found.attention
        values = {
            "attention": seen,
            "residual": found.residual[:, None],
            "final": found.final[None],
        }
        data = {
            name: trace.labels_of.array(
                x, dims_of(SITES[name]), name, {"site": SITES[name].holds}, positions=[position]
            )
            for name, x in values.items()
        }
        return dataclasses.replace(trace, data=data)

    def lens(
        self,
        at: TokenRecord | int,
        *,
        turn: Turn | int | None = None,
        k: int = 10,
        watch: Sequence[int] | None = None,
    ) -> xarray.Dataset:
        """What would have been predicted in a token's place if the model ended after each layer.

        It is `gnb.logit_lens` of what `look` shows, and as soon there.

        Args:
          at: a token of any reply, or the event that told of it, or its index.
          turn: the reply, where it is not clear from `at`; None with an index: the last reply.
          k: how many of the best tokens.
          watch: token ids whose log-probability and rank are wanted in every layer; None for the
            token at `at`.

        Returns:
          As of `gnb.logit_lens`; the one position is that of the token before the one at `at`.

        Raises:
          ValueError: no such token or turn, or an unknown token id.
        """
        from gemma_nb.interp.lens import logit_lens

        node, index = self._tree.token(at, turn)
        record = node.said.tokens[index]
        watched = [record.token_id] if watch is None else watch
        trace = self.look(index, turn=node.said)
        return logit_lens(trace, k, positions=record.position - 1, watch=watched)

    # --- internals ------------------------------------------------------------------------------

    def _source(self, model: GemmaTransformer, ids: Sequence[int]) -> Pass:
        """The pass of `ids`, which knows what replying has computed and the session still holds."""
        from gemma_nb.interp.passes import WORTH, Pass

        source, decoder = Pass.of(model, np.asarray(ids, np.int32)), self._decoder
        if len(ids) >= WORTH:
            with suppress(BusyError), self._core.lock.alone():
                if decoder.interventions is model.interventions:
                    source.learn(decoder.residuals(ids))
        return source

    def _inspect_position(
        self, turn: Turn, ids: Sequence[int], position: int
    ) -> InspectedPosition | None:
        """The decoder's view of a position of `ids`; None where it has none now."""
        decoder, stop = self._decoder, position + 1
        with suppress(BusyError), self._core.lock.alone():
            same = decoder.interventions is self._core.made_under.of(turn)
            if decoder.traits.can_capture and same and decoder.holds(ids[:stop]):
                return decoder.inspect_position(position)
        return None
