"""A conversation with a model: what was said, what is in the cache, and the next reply."""

from __future__ import annotations

import dataclasses
import secrets
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from gemma_nb.chat.events import TokenEvent, TokenRecord, Turn
from gemma_nb.chat.interrupts import between_steps
from gemma_nb.chat.reply import Reply
from gemma_nb.chat.tree import ConversationTree, Node
from gemma_nb.errors import BusyError, NonFiniteLogitsError
from gemma_nb.model import GemmaTransformer
from gemma_nb.sampling.decode import Decoder
from gemma_nb.sampling.evidence import Capture, Evidence
from gemma_nb.sampling.methods import Sampling
from gemma_nb.text.template import Message, Template, resolve_template
from gemma_nb.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gemma_nb.interp.trace import Trace

_STOPPED = "The reply was stopped."
_DROPPED = "Nobody waited for the rest of the reply."


class ChatSession:
    """Chats with a model, and keeps the evidence of every token of its replies.

        chat = gnb.ChatSession(model, tokenizer)
        turn = chat.chat("What is the capital of France?")

    One session generates one reply at a time.  What is still in the key-value cache is never
    computed again.

    Attributes:
      model: what computes.
      tokenizer: what reads and writes text.
      template: how turns become tokens.
      capture: what evidence each token keeps.
      tree: all branches of the conversation.
    """

    def __init__(
        self,
        model: GemmaTransformer,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        cache_length: int = 4096,
        capture: Capture | None = None,
        template: str | Template = "auto",
    ) -> None:
        """Starts an empty conversation.

        Args:
          model: from `gnb.load`.
          tokenizer: from `gnb.load`.
          system: what the model is told before the conversation; None takes the template's own.
          sampling: None takes what is recommended for the model.
          cache_length: most positions (tokens) of context.
          capture: evidence to keep; by default ten alternatives per token.
          template: "gemma" for instruction-tuned models, "transcript" for base models, "none" for
            raw text, "auto" to choose by the model, or your own `Template`.

        Raises:
          ValueError: a cache longer than the model's context, or an unknown template.
        """
        longest = model.config.max_context
        if not 2 <= cache_length <= longest:
            raise ValueError(
                f"cache_length must lie in 2 to {longest} (the model's context), got {cache_length}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.template = resolve_template(template, model.info.tuning if model.info else "base")
        self.capture = capture or Capture()
        self.tree = ConversationTree()
        self._sampling = sampling or Sampling.recommended(model)
        self._system = self.template.default_system if system is None else system
        self._decoder = Decoder(model, limit=cache_length, top_k=self.capture.top_k)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._reply: Reply | None = None
        self._stream: weakref.ref[Generator[TokenEvent, None, None]] | None = None
        self._reader: int | None = None  # the thread that read the last token
        self._ids_given = 0
        self.tokenizer.encode(self._system or "")  # refuses what cannot be tokenized, now

    # --- state ----------------------------------------------------------------------------------

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The conversation so far, on the active branch."""
        return self.tree.turns

    @property
    def partial(self) -> Turn | None:
        """The reply being made right now, as far as it has come."""
        reply = self._reply
        return None if reply is None else reply.turn()

    @property
    def busy(self) -> bool:
        """Whether a reply is being made."""
        return self._lock.locked()

    @property
    def cache_length(self) -> int:
        """Most positions of context."""
        return self._decoder.limit

    @property
    def cache_used(self) -> int:
        """Positions of context in use."""
        return len(self._decoder.ids)

    @property
    def sampling(self) -> Sampling:
        """How the next reply is sampled."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        if not isinstance(sampling, Sampling):
            raise TypeError(f"sampling must be a gnb.Sampling, got {type(sampling).__name__}")
        self._sampling = sampling

    @property
    def system(self) -> str | None:
        """What the model is told before the conversation; a change holds from the next reply on."""
        return self._system

    @system.setter
    def system(self, system: str | None) -> None:
        self.tokenizer.encode(system or "")
        with self._alone():
            self._system = system

    def __repr__(self) -> str:
        title = self.model.info.title if self.model.info else "Gemma"
        return (
            f"<ChatSession {title}, {self.template.name}: {len(self.turns)} turns, "
            f"{self.cache_used} of {self.cache_length} positions>"
        )

    # --- talking --------------------------------------------------------------------------------

    def stream(self, text: str) -> Iterator[TokenEvent]:
        """Says `text` and yields the reply's tokens as they are made.

        The turn is in `turns` when the iterator ends, however it ends: also when it is dropped
        half-way, stopped, interrupted or failed.  Then it holds what had come, and
        `finish_reason` says why.  The last event of a reply that came to its end carries
        `finish_reason`; a reply that is stopped from outside has no further event.

        Raises:
          BusyError: a reply is being made already.
          TextError: text that cannot be tokenized.
          NonFiniteLogitsError: the model computed NaN or infinity.
        """
        if not isinstance(text, str):
            raise TypeError(f"a message must be a string, got {type(text).__name__}")
        self.tokenizer.encode(text)
        self._refuse_if_busy()
        return self._start(text)

    def stream_regenerate(self) -> Iterator[TokenEvent]:
        """Makes another reply to the last message, beside the one there is; like `stream`.

        With a fixed seed the n-th attempt uses seed + n, so it differs and can be repeated.

        Raises:
          BusyError: a reply is being made already.
          ValueError: nothing was said yet.
        """
        self._refuse_if_busy()
        if not self.turns:
            raise ValueError("there is no reply to regenerate: send a message first")
        return self._start(None)

    def chat(self, text: str) -> Turn:
        """Says `text` and returns the whole reply; raises as `stream` does."""
        return self._exhaust(self.stream(text))

    def regenerate(self) -> Turn:
        """Makes another reply to the last message; raises as `stream_regenerate` does."""
        return self._exhaust(self.stream_regenerate())

    def stop(self) -> None:
        """Ends the reply being made after the current token.  Callable from any thread.

        Called on the thread that was reading `stream`, it ends a reply that nobody reads on, too.
        """
        self._stop.set()
        stream = self._stream() if self._stream is not None else None
        if stream is not None and self._reader == threading.get_ident():
            # Closing fails while the generator runs; then it looks at the flag itself.
            with suppress(ValueError):
                stream.close()

    def new_conversation(self) -> None:
        """Starts over with an empty conversation; the old one stays in `tree`.

        Raises:
          BusyError: a reply is being made.
        """
        with self._alone():
            self.tree.root.active = None
            self._decoder.keep(self._context(()))

    def warmup(self, progress: Callable[[float, str], None] | None = None) -> None:
        """Compiles what a conversation needs and computes the template's own beginning.

        Args:
          progress: called with a fraction and a sentence.

        Raises:
          BusyError: a reply is being made.
        """

        def report(fraction: float) -> None:
            if progress is not None:
                progress(fraction, "Compiling the model for this machine")

        with self._alone(), between_steps():
            report(0.0)
            self._decoder.compile(report)
            opening = self._context(())
            if 0 < len(opening) < self.cache_length:
                rest = self._decoder.begin(opening, Sampling(seed=0))
                self._decoder.prefill(rest)

    # --- looking --------------------------------------------------------------------------------

    def trace(
        self,
        turn: Turn | None = None,
        *,
        sites: Sequence[str] = ("attention",),
        layers: Iterable[int] | int | None = None,
    ) -> Trace:
        """Computes what happened inside the model up to and including a turn.

        The whole context of that turn is run through the plain forward pass in the precision of
        the model's parameters, so positions are those of the turn's token records.

        Args:
          turn: a turn of any branch; None is the last reply.
          sites: see `gnb.list_sites`.
          layers: None for all.

        Raises:
          ValueError: no such turn, site or layer.
        """
        from gemma_nb.interp.trace import trace

        return trace(
            self.model,
            self.tokens(turn),
            tokenizer=self.tokenizer,
            sites=sites,
            layers=layers,
        )

    def tokens(self, turn: Turn | None = None) -> list[int]:
        """The token ids of the context up to and including a turn (None: the last reply).

        Raises:
          ValueError: the turn is not of this conversation, or there is none.
        """
        if turn is None:
            turn = next((t for t in reversed(self.turns) if t.role == "model"), None)
            if turn is None:
                raise ValueError("there is no reply yet: send a message first")
        path = self.tree.path_to(turn)
        if turn.role == "user":
            return self._context(path)
        return self._context(path[:-1]) + [record.token_id for record in turn.tokens]

    # --- inside ---------------------------------------------------------------------------------

    def _start(self, text: str | None) -> Generator[TokenEvent, None, None]:
        stream = self._generate(text)
        # Weak, so that a stream that its reader drops is closed at once.
        self._stream = weakref.ref(stream)
        return stream

    def _generate(self, text: str | None) -> Generator[TokenEvent, None, None]:
        """One reply, to `text` or (None) another one to the last message."""
        with self._alone():
            self._stop.clear()
            asked = self._ask(text)
            reply = self._reply = Reply(
                self._new_id(), self.tokenizer, self.template, self._seeded(asked)
            )
            try:
                for evidence, position in self._choices(reply, asked):
                    records = reply.add(evidence, position)
                    self._end_from_outside(reply)
                    if reply.finish_reason is not None:
                        records += reply.flush()
                    yield from self._events(records, reply)
            except GeneratorExit:
                stopped = self._stop.is_set()
                reply.finish("cancelled", _STOPPED if stopped else _DROPPED)
                raise
            except KeyboardInterrupt:
                reply.finish("interrupted", "The kernel was interrupted.")
                raise
            except BaseException as error:
                reply.finish("error", f"{type(error).__name__}: {error}")
                raise
            finally:
                reply.flush()
                self.tree.add(asked, reply.turn())
                self._reply = None

    def _choices(self, reply: Reply, asked: Node) -> Iterator[tuple[Evidence, int]]:
        """Each choice with the position of the chosen token, until the reply is finished."""
        assert asked.turn is not None
        context = self._context(self.tree.path_to(asked.turn))
        if len(context) > self.cache_length:
            reply.finish(
                "length",
                f"The context is full: with this message it needs {len(context)} positions and "
                f"there are {self.cache_length}.  Start a new conversation, or a session with a "
                "larger cache_length.",
            )
            return
        rest = self._decoder.begin(context, reply.sampling)
        reply.prompt(len(rest))
        with between_steps():
            evidence = self._decoder.prefill(rest, lambda fed: not self._stop.is_set())
        self._end_from_outside(reply)
        while evidence is not None:
            position = len(self._decoder.ids)
            if not evidence.finite:
                self._decoder.reset()
                raise NonFiniteLogitsError(
                    f"the logits at position {position - 1} are not finite: the weights hold NaN "
                    "or infinity, or the activations overflowed.  Reload the model, or load it "
                    'with dtype="float32".'
                )
            self._reader = threading.get_ident()
            yield evidence, position
            self._end_from_outside(reply)
            if reply.finish_reason is not None:
                return
            with between_steps():
                evidence = self._decoder.step()

    def _end_from_outside(self, reply: Reply) -> None:
        """Finishes a reply that was stopped, or for which there is no more room."""
        if self._stop.is_set():
            reply.finish("cancelled", _STOPPED)
        elif self._decoder.full:
            reply.finish(
                "length",
                f"The context is full: {self.cache_used} of {self.cache_length} positions are in "
                "use.  Start a new conversation, or a session with a larger cache_length.",
            )

    def _events(self, records: Sequence[TokenRecord], reply: Reply) -> Iterator[TokenEvent]:
        for record in records:
            reason = reply.finish_reason if record is records[-1] else None
            fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
            yield TokenEvent(**fields, cache_used=self.cache_used, finish_reason=reason)

    def _ask(self, text: str | None) -> Node:
        """The user's node that the reply belongs to."""
        tip = self.tree.tip
        if text is not None:
            return self.tree.add(tip, Turn(id=self._new_id(), role="user", text=text))
        if tip.turn is not None and tip.turn.role == "model" and tip.parent is not None:
            return tip.parent
        return tip

    def _seeded(self, asked: Node) -> Sampling:
        """The settings with a seed of this attempt's own."""
        attempt, seed = len(asked.children), self._sampling.seed
        chosen = secrets.randbits(31) if seed is None else (seed + attempt) % 2**32
        return dataclasses.replace(
            self._sampling,
            seed=chosen,
            forbidden=(
                *self._sampling.forbidden,
                *self.template.forbidden_ids(self.tokenizer),
                # Some embeddings have rows that stand for no token.
                *range(self.tokenizer.vocab_size, self.model.config.num_embed),
            ),
        )

    def _context(self, turns: Sequence[Turn]) -> list[int]:
        messages = [Message(turn.role, turn.text, turn.ids) for turn in turns]
        return self.template.encode(self.tokenizer, messages, self._system)

    def _new_id(self) -> int:
        self._ids_given += 1
        return self._ids_given

    def _refuse_if_busy(self) -> None:
        if self.busy:
            raise BusyError(
                "a reply is being made in this session: wait for its end, or call chat.stop()"
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the session's lock; refuses rather than waits."""
        if not self._lock.acquire(blocking=False):
            self._refuse_if_busy()
            raise BusyError("the session is in use by another thread: try again")
        try:
            yield
        finally:
            self._lock.release()

    def _exhaust(self, events: Iterator[TokenEvent]) -> Turn:
        for _ in events:
            pass
        return self.turns[-1]
