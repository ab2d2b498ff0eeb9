"""The state of a conversation, and the one place where a reply is made and put into the tree."""

from __future__ import annotations

import dataclasses
import importlib
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NoReturn

from gemma_nb import settings
from gemma_nb.chat.branches import Plan, Planner
from gemma_nb.chat.context import WhenFull, check_policy
from gemma_nb.chat.events import PrefillEvent, TokenEvent
from gemma_nb.chat.generation import STOPPED, Generation
from gemma_nb.chat.interrupts import between_steps
from gemma_nb.chat.places import turn_of
from gemma_nb.chat.reading import Reading, close, closed_at_end
from gemma_nb.chat.records import TokenRecord
from gemma_nb.chat.reply import Reply
from gemma_nb.chat.saving.session_file import SessionFile
from gemma_nb.chat.tree import ConversationTree
from gemma_nb.chat.turns import Context, Turn
from gemma_nb.errors import BusyError, ContextFullError, ConversationWarning, InterventionWarning
from gemma_nb.expected import expect
from gemma_nb.interventions.reach import warn_of_unreached
from gemma_nb.model import GemmaTransformer
from gemma_nb.sampling import ahead
from gemma_nb.sampling.decode import Decoder
from gemma_nb.sampling.evidence import Capture
from gemma_nb.sampling.look import can_look
from gemma_nb.sampling.methods import Sampling
from gemma_nb.sampling.rows import AttentionKept, AttentionRows
from gemma_nb.text.prefix import shared_prefix
from gemma_nb.text.template import Template, resolve_template
from gemma_nb.text.tokenizer import Tokenizer

_LENGTH = 4096  # positions of context, unless a session says otherwise
_DROPPED = "Nobody waited for the rest of the reply."
# What a first picture imports, which takes half a second.
_FOR_PICTURES = ("xarray", "matplotlib.figure")


class Conversation:
    """What `ChatSession` operates on; see there.

    Attributes:
      model: what computes.
      tokenizer: what reads and writes text.
      template: how turns become tokens.
      capture: what evidence each token keeps.
      tree: all branches of the conversation.
      keeper: where it is saved.
    """

    def __init__(
        self,
        model: GemmaTransformer,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        sampling: Sampling | Mapping[str, Any] | None = None,
        cache_length: int | None = _LENGTH,
        capture: Capture | Mapping[str, Any] | None = None,
        template: str | Template | None = "auto",
        when_full: WhenFull | None = "stop",
        autosave: str | os.PathLike[str] | None = None,
    ) -> None:
        """Starts an empty conversation.  None for an argument is its default.

        Args:
          model: from `gnb.load`.
          tokenizer: from `gnb.load`.
          system: what the model is told before the conversation; None takes the template's own.
          sampling: a `Sampling`, or a mapping of its fields as JSON has them; None takes what is
            recommended for the model.
          cache_length: most positions (tokens) of context.
          capture: evidence to keep, likewise; by default ten alternatives per token, and no
            attention.
          template: "gemma" for instruction-tuned models, "transcript" for base models, "none" for
            raw text, "auto" to choose by the model: the chat template of its files, where these
            have one; or your own, as a `Template` or a Jinja text.
          when_full: what happens when the context is full.  "stop": the reply ends there.
            "drop_oldest": the oldest exchanges are left out of the context, never of the tree; the
            system text stays.  "error": ContextFullError.  The conversation goes on after each.
          autosave: a file to save to while the conversation goes on; see the property.

        Raises:
          ValueError: a cache longer than the model's context, an unknown template or policy.
          TemplateError: the chat template of the model's files cannot be followed.
          ConversationError: the file to save to cannot be written, or exists already.
        """
        way = "gnb.ChatSession(model, tokenizer), both from gnb.load(...)"
        expect(model, GemmaTransformer, "model", way)
        if not hasattr(tokenizer, "token_text"):
            expect(tokenizer, Tokenizer, "tokenizer", way)
        longest = model.config.max_context
        cache_length = settings.whole(
            "cache_length", _LENGTH if cache_length is None else cache_length
        )
        if not 2 <= cache_length <= longest:
            raise ValueError(
                f"cache_length must lie in 2 to {longest} (the model's context), got {cache_length}"
            )
        room = "there is room for {} tokens (cache_length)"
        warn_of_unreached(model.interventions, cache_length, room)
        self.model = model
        self.tokenizer = tokenizer
        info = model.info
        own = info.chat_templates if info else None
        self.template = resolve_template(template, info.tuning if info else "base", own, tokenizer)
        self.capture = settings.record(
            Capture, "capture", {} if capture is None else capture
        ).resolved(model.config.num_layers)
        self.tree = ConversationTree()
        system = self.template.default_system if system is None else system
        self._check_system(system)
        self._rows = AttentionRows(self.capture, model, tokenizer, shown=can_look(model))
        self._decoder = Decoder(
            model, limit=cache_length, top_k=self.capture.top_k, rows=self._rows
        )
        self._planner = Planner(
            *(model, tokenizer, self.template, self._decoder),
            top_k=self.capture.top_k,
            sampling=Sampling.given(sampling) or Sampling.recommended(model),
            system=system,
            when_full=check_policy("stop" if when_full is None else when_full),
        )
        self._planner.remember_in(self.tree.under)
        self._generation = Generation(self._decoder, self._planner)
        self._lock = threading.Lock()
        self._making: tuple[int, Reply] | None = None  # the message's id, and the reply to it
        self._reading: Reading | None = None  # of the last reply
        self._ids_given = 0
        self._told_evicted = False
        self._unreached: tuple[str, ...] = ()  # of the last reply, not yet told
        self.keeper = SessionFile()
        self.keeper.autosave(self, autosave)

    # --- state ----------------------------------------------------------------------------------

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The conversation so far, on the active branch."""
        return self.tree.turns

    @property
    def partial(self) -> Turn | None:
        """The reply being made right now, as far as it has come; it follows `turns`."""
        making = self.making
        return None if making is None else making[1]

    @property
    def making(self) -> tuple[int, Turn] | None:
        """The id of the message that is being replied to, and the reply as far as it has come."""
        making = self._making
        return None if making is None else (making[0], making[1].turn())

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
        """Positions of context in use, on the active branch."""
        if self._making is not None:
            return len(self._decoder.ids)
        last = self.tree.context
        if last is not None:
            return last.used
        return shared_prefix(self._decoder.ids, self._planner.contexts.opening(self.system))

    @property
    def context(self) -> Context:
        """How full the context is: `fraction`, `nearly_full`, and a `warning` to show."""
        making = self._making
        last = self.tree.context if making is None else making[1].context
        dropped = last.dropped if last is not None else 0
        return Context(self.system, dropped, self.cache_used, self.cache_length)

    @property
    def attention_kept(self) -> AttentionKept:
        """How many tokens have their `attention`, what it takes, and how many rows were evicted.

        Its `warning` is what there is to tell; the first time that something is evicted, it is also
        a ConversationWarning, at the end of the reply or before the next one.
        """
        return self._rows.kept

    @property
    def sampling(self) -> Sampling:
        """How the next reply is sampled."""
        return self._planner.sampling

    @sampling.setter
    def sampling(self, sampling: Sampling | Mapping[str, Any]) -> None:
        given = Sampling.given(sampling)
        if given is None:
            settings.refuse("sampling", "a gnb.Sampling or a mapping of its fields", sampling)
        self._planner.sampling = given

    @property
    def system(self) -> str | None:
        """What the model is told before the conversation; a change holds from the next reply on."""
        return self._planner.system

    @system.setter
    def system(self, system: str | None) -> None:
        self._check_system(system)
        with self._alone():
            self._planner.system = system

    @property
    def when_full(self) -> WhenFull:
        """What happens when the context is full; a change holds from the next reply on."""
        return self._planner.when_full

    @when_full.setter
    def when_full(self, when_full: WhenFull) -> None:
        policy = check_policy(when_full)
        with self._alone():
            self._planner.when_full = policy

    def __repr__(self) -> str:
        return (
            f"<ChatSession {self.model.title}, {self.template.name}: {len(self.turns)} turns, "
            f"{self.cache_used} of {self.cache_length} positions>"
        )

    def __reduce_ex__(self, _: object) -> NoReturn:
        name = type(self).__name__
        raise TypeError(
            f"a {name} holds locks and what is cached on the device, and cannot be pickled or "
            f"copied: chat.save(path) writes it, gnb.{name}.load(path, model, tokenizer) reads it"
        )

    def adopt(self, tree: ConversationTree) -> None:
        """Goes on with another conversation's tree in place of this one's.

        Raises:
          BusyError: a reply is being made.
        """
        with self._alone():
            self.tree = tree
            self._planner.remember_in(tree.under)
            self._ids_given = tree.last_id

    def on_prefill(self, listener: Callable[[PrefillEvent], None]) -> Callable[[], None]:
        """Calls `listener(event)` after each piece of a prompt that is read for a reply.

            chat.on_prefill(lambda event: print(f"{event.done} of {event.total} tokens"))

        A long prompt is read in pieces of up to 256 tokens, and `stop` and the kernel's interrupt
        end it between any two.  What was read stays cached: `regenerate` goes on from there.

        Args:
          listener: called on the thread that makes the reply; an exception of its own ends that
            reply.

        Returns:
          What takes the listener away again.
        """
        listeners = self._generation.listeners
        listeners.append(listener)

        def forget() -> None:
            with suppress(ValueError):
                listeners.remove(listener)

        return forget

    def stop(self) -> None:
        """Ends the reply being made after the current token, or piece of a prompt.

        Callable from any thread.

        Called on the thread that was reading `stream`, it ends a reply that nobody reads on, too.
        """
        self._generation.stop.set()
        reading = self._reading
        if reading is not None and reading.thread is threading.current_thread():
            close(reading.stream)

    def warmup(self, progress: Callable[[float, str], None] | None = None) -> None:
        """Compiles what a conversation needs and computes the template's own beginning.

        What the first picture of its inside imports is imported meanwhile, on another thread.

        Args:
          progress: called with a fraction and a sentence.

        Raises:
          BusyError: a reply is being made.
        """

        def report(fraction: float) -> None:
            if progress is not None:
                progress(fraction, "Compiling the model for this machine")

        with self._alone():
            report(0.0)
            self._decoder.compile(report)
            opening = self._planner.contexts.opening(self.system)
            if 0 < len(opening) < self.cache_length:
                rest = self._decoder.begin(opening, Sampling(seed=0))
                self._decoder.prefill(rest)
        ahead.begin([partial(importlib.import_module, name) for name in _FOR_PICTURES])

    # --- inside ---------------------------------------------------------------------------------

    def _start(self, make: Callable[[], Plan]) -> Generator[TokenEvent, None, None]:
        """The stream of the reply that `make()` plans, once it is read."""
        self._refuse_if_busy()
        self.keeper.warn()
        self._tell()
        reading = Reading()
        stream = self._generate(make, reading)
        # Weak, so that a stream that its reader drops is closed at once.
        reading.stream = weakref.ref(stream)
        return stream

    def _generate(
        self, make: Callable[[], Plan], reading: Reading
    ) -> Generator[TokenEvent, None, None]:
        """The stream of a reply, which an interrupt ends between two of its steps.

        What happens in between is the reader's, and may be interrupted anywhere.
        """
        making = self._make_reply(make, reading)
        try:
            while True:
                with between_steps():
                    event = next(making, None)
                if event is None:
                    return
                yield event
        except GeneratorExit:
            with between_steps():
                making.close()
            raise
        except KeyboardInterrupt as interrupt:
            with between_steps():
                making.throw(interrupt)

    def _make_reply(
        self, make: Callable[[], Plan], reading: Reading
    ) -> Generator[TokenEvent, None, None]:
        generation = self._generation
        with self._locked(), closed_at_end(reading):
            generation.stop.clear()
            plan = make()
            reply = self._new_reply(plan)
            self.tree.select(plan.parent)
            self.tree.show_after(plan.parent, None)  # until the reply is there
            self._making = (plan.parent.id, reply)
            self._reading = reading
            try:
                for records in generation.run(plan, reply):
                    reading.thread = threading.current_thread()
                    yield from self._events(records, reply)
            except GeneratorExit:
                stopped = generation.stop.is_set()
                reply.finish("cancelled", STOPPED if stopped else _DROPPED)
                raise
            except KeyboardInterrupt:
                reply.finish("interrupted", "The kernel was interrupted.")
                raise
            except BaseException as error:
                reply.finish("error", f"{type(error).__name__}: {error}")
                raise
            finally:
                reply.flush()
                self.tree.add(plan.parent, reply.turn())
                self._unreached = reply.unreached
                self._making = None
            if generation.out_of_room and self.when_full == "error":
                raise ContextFullError(reply.finish_detail)

    def _new_reply(self, plan: Plan, turn_id: int | None = None) -> Reply:
        turn_id = self._new_id() if turn_id is None else turn_id
        self._planner.remember(turn_id, plan.interventions)
        return Reply(
            turn_id,
            self.tokenizer,
            self.template,
            plan.sampling,
            origin=plan.origin,
            context=plan.context,
            under=plan.interventions,
        )

    def _events(self, records: Sequence[TokenRecord], reply: Reply) -> Iterator[TokenEvent]:
        for record in records:
            reason = reply.finish_reason if record is records[-1] else None
            fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
            used = Context(used=self.cache_used, length=self.cache_length)
            yield TokenEvent(
                **fields,
                cache_used=used.used,
                finish_reason=reason,
                nearly_full=used.nearly_full,
            )

    def _check_system(self, system: object) -> None:
        """Refuses a system text that is none, cannot be tokenized, or that the template refuses."""
        if not isinstance(system, str | None):
            settings.refuse("system", "a string or None", system)
        self.tokenizer.encode(system or "")
        self.template.check_system(system)

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
        """Holds the session's lock, and interrupts back; refuses rather than waits."""
        with between_steps(), self._locked():
            yield

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the session's lock; while interrupts are held back, or it might stay locked."""
        if not self._lock.acquire(blocking=False):
            self._refuse_if_busy()
            raise BusyError("the session is in use by another thread: try again")
        try:
            yield
        finally:
            self._lock.release()

    def _exhaust(self, events: Iterator[TokenEvent]) -> Turn:
        with between_steps():  # one between two tokens ends the reply, too
            for _ in events:
                pass
        self._tell()
        return turn_of(self.tree.tip)

    def _tell(self) -> None:
        """Warns of what came up while a reply was made; called on the user's thread."""
        sentences, self._unreached = self._unreached, ()
        for sentence in sentences:
            warnings.warn(sentence, InterventionWarning, stacklevel=4)
        warning = "" if self._told_evicted else self.attention_kept.warning
        if warning:
            self._told_evicted = True
            warnings.warn(warning, ConversationWarning, stacklevel=4)
