"""Replies: the one place where a reply is made, streamed, and put into the tree."""

from __future__ import annotations

import dataclasses
import importlib
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from functools import partial

from gemma_nb.chat.core import SessionCore
from gemma_nb.chat.events import PrefillEvent, TokenEvent
from gemma_nb.chat.generation import STOPPED, Generation
from gemma_nb.chat.interrupts import between_steps
from gemma_nb.chat.plans import Plan
from gemma_nb.chat.readers import Reader, close, closed_at_end
from gemma_nb.chat.records import TokenRecord
from gemma_nb.chat.reply import Reply
from gemma_nb.chat.saving.session_file import SessionFile
from gemma_nb.chat.turns import Context, Turn
from gemma_nb.chat.user_warnings import warn_user
from gemma_nb.errors import ContextFullError, ConversationWarning, InterventionWarning
from gemma_nb.sampling import compile_ahead
from gemma_nb.sampling.settings import Sampling
from gemma_nb.text.prefix import shared_prefix

# Imports of a first picture, which take half a second.
_FOR_PICTURES = ("xarray", "matplotlib.figure")
_DROPPED = "Nobody waited for the rest of the reply."


class Replies:
    """Makes the replies of a session, one at a time, and tells of each token as it comes."""

    def __init__(
        self, owner: object, core: SessionCore, generation: Generation, file: SessionFile
    ) -> None:
        """No reply yet.

        Args:
          owner: the session, which lives at least as long as a stream of its replies.
          core: of the session.
          generation: what makes the replies.
          file: of the session, of which it is told when it cannot be written.
        """
        self._owner = weakref.ref(owner)
        self._core = core
        self._tree = core.tree
        self._generation = generation
        self._file = file
        self._making: tuple[int, Reply] | None = None  # the message's id, and the reply to it
        self._reader: Reader | None = None  # of the last reply
        self._told_evicted = False
        self._unreached: tuple[str, ...] = ()  # of the last reply, not yet told

    @property
    def making(self) -> tuple[int, Turn] | None:
        """The id of the message that is being replied to, and the reply as far as it has come."""
        making = self._making
        return None if making is None else (making[0], making[1].turn())

    @property
    def used(self) -> int:
        """Positions of context in use, on the active branch."""
        ids, last = self._core.decoder.ids, self._tree.context
        if self._making is not None:
            return len(ids)
        if last is not None:
            return last.used
        return shared_prefix(ids, self._core.contexts.opening(self._core.settings.system))

    @property
    def context(self) -> Context:
        """The context as it is now, also while a reply is being made."""
        making = self._making
        last = self._tree.context if making is None else making[1].context
        dropped = last.dropped if last is not None else 0
        return Context(self._core.settings.system, dropped, self.used, self._core.decoder.limit)

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
        reader = self._reader
        if reader is not None and reader.thread is threading.current_thread():
            close(reader.stream)

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

        with self._core.lock.alone():
            report(0.0)
            self._core.decoder.compile(report)
            opening = self._core.contexts.opening(self._core.settings.system)
            if 0 < len(opening) < self._core.decoder.limit:
                rest = self._core.decoder.begin(opening, Sampling(seed=0))
                self._core.decoder.prefill(rest)
        compile_ahead.begin([partial(importlib.import_module, name) for name in _FOR_PICTURES])

    def start(self, make: Callable[[], Plan]) -> Generator[TokenEvent, None, None]:
        """The stream of the reply that `make()` plans, once it is read."""
        self._core.lock.refuse_if_busy()
        self._file.warn()
        self._tell()
        reader = Reader()
        stream = self._stream(make, reader, self._owner())
        # Weak, so that a stream that its reader drops is closed at once.
        reader.stream = weakref.ref(stream)
        return stream

    def exhaust(self, events: Iterator[TokenEvent]) -> Turn:
        """The reply of a stream, when all of it was read."""
        with between_steps():  # one between two tokens ends the reply, too
            for _ in events:
                pass
        self._tell()
        return self._tree.tip.said

    def beside_the_tree(self, replies: Sequence[Reply]) -> list[Turn]:
        """Finished replies that are not put into the tree, when the user was told of them."""
        self._unreached = tuple(dict.fromkeys(x for reply in replies for x in reply.unreached))
        self._tell()
        return [reply.turn() for reply in replies]

    def _stream(
        self, make: Callable[[], Plan], reader: Reader, owner: object
    ) -> Generator[TokenEvent, None, None]:
        """The stream of a reply, which an interrupt ends between two of its steps.

        What happens in between is the reader's, and may be interrupted anywhere.  The stream holds
        its `owner`.
        """
        making = self._make(make, reader)
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

    def _make(self, make: Callable[[], Plan], reader: Reader) -> Generator[TokenEvent, None, None]:
        generation, tree = self._generation, self._tree
        with self._core.lock.held(), closed_at_end(reader):
            generation.stop.clear()
            plan = make()
            reply = generation.begin(plan, tree.new_id())
            tree.select(plan.parent)
            tree.show_after(plan.parent, None)  # until the reply is there
            self._making = (plan.parent.id, reply)
            self._reader = reader
            try:
                for records in generation.run(plan, reply):
                    reader.thread = threading.current_thread()
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
                tree.add(plan.parent, reply.turn())
                self._unreached = reply.unreached
                self._making = None
            if generation.out_of_room and self._core.settings.when_full == "error":
                raise ContextFullError(reply.finish_detail)

    def _events(self, records: Sequence[TokenRecord], reply: Reply) -> Iterator[TokenEvent]:
        for record in records:
            reason = reply.finish_reason if record is records[-1] else None
            fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
            used = Context(used=len(self._core.decoder.ids), length=self._core.decoder.limit)
            yield TokenEvent(
                **fields,
                cache_used=used.used,
                finish_reason=reason,
                nearly_full=used.nearly_full,
            )

    def _tell(self) -> None:
        """Warns of what came up while a reply was made; called on the user's thread."""
        sentences, self._unreached = self._unreached, ()
        for sentence in sentences:
            warn_user(sentence, InterventionWarning)
        warning = "" if self._told_evicted else self._core.rows.kept.warning
        if warning:
            self._told_evicted = True
            warn_user(warning, ConversationWarning)
