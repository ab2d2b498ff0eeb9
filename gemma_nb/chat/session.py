"""A conversation with a model: say something, and branch off anywhere."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

from gemma_nb.chat.branching import Branching
from gemma_nb.chat.context import WhenFull
from gemma_nb.chat.continuations import Continuations
from gemma_nb.chat.core import LENGTH, SessionCore
from gemma_nb.chat.delegation import delegated
from gemma_nb.chat.events import TokenEvent
from gemma_nb.chat.generation import Generation
from gemma_nb.chat.inspection import Inspector
from gemma_nb.chat.plans import NewReplies
from gemma_nb.chat.recompute import Recomputation
from gemma_nb.chat.replies import Replies
from gemma_nb.chat.sampling_many import ManySampler
from gemma_nb.chat.saving import messages as imports
from gemma_nb.chat.saving import session_file
from gemma_nb.chat.saving.fingerprint import Fingerprint
from gemma_nb.chat.saving.session_file import SessionFile
from gemma_nb.chat.scoring import Scorer
from gemma_nb.chat.tree import ConversationTree
from gemma_nb.chat.turns import Context, Turn
from gemma_nb.interventions import Intervention
from gemma_nb.model import GemmaTransformer
from gemma_nb.sampling.rows import AttentionKept
from gemma_nb.sampling.settings import Capture, Sampling
from gemma_nb.text.template import Template
from gemma_nb.text.tokenizer import Tokenizer


class ChatSession:
    """Chats with a model, and keeps the evidence of every token of its replies.

        chat = gnb.ChatSession(model, tokenizer)
        turn = chat.chat("What is the capital of France?")
        chat.fork(turn.tokens[3], with_token=" Rome")

    One session generates one reply at a time.  What is still in the key-value cache is never
    computed again.  Every operation adds a branch to `tree` or hides one; nothing is ever lost.

    Methods that make a reply raise BusyError while another one is being made, TextError for text
    that cannot be tokenized, NonFiniteLogitsError when the model computes NaN or infinity, and
    ContextFullError where there is no room and `when_full` does not provide for it.  Each has a
    streaming variant, `stream` or `stream_...`, which yields the new tokens as they are made and
    raises the same.

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
        sampling: Sampling | Mapping[str, Any] | None = None,
        cache_length: int | None = LENGTH,
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
        core = SessionCore.of(
            model,
            tokenizer,
            system=system,
            sampling=sampling,
            cache_length=cache_length,
            capture=capture,
            template=template,
            when_full=when_full,
        )
        self.model, self.tokenizer, self.template = model, tokenizer, core.template
        self.capture, self.tree = core.capture, core.tree
        self._core = core
        self._decoder = core.decoder
        scorer = Scorer(model, tokenizer, core.decoder, core.settings, top_k=core.capture.top_k)
        generation = Generation(core.decoder, tokenizer, core.settings, core.made_under)
        self._new = new = NewReplies(model, core.contexts, core.settings)
        self._file = SessionFile(self)
        self._replies = replies = Replies(self, core, generation, self._file)
        continuations = Continuations(core, new, scorer)
        self._branching = Branching(core, replies, generation, new, continuations)
        self._inspector = Inspector(core, new, scorer)
        self._many = ManySampler(core, new, generation, replies)
        self.autosave = autosave

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """Raises TypeError, which says how a message is sent."""
        raise TypeError(
            "a ChatSession is no function: chat.chat(text) returns a reply, chat.stream(text) "
            "yields it token by token"
        )

    # --- talking --------------------------------------------------------------------------------

    def chat(self, text: str) -> Turn:
        """Says `text` and returns the whole reply; raises as `stream` does."""
        return self._replies.exhaust(self.stream(text))

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
          ContextFullError: there is no room and `when_full` is "error"; when the message itself
            does not fit, nothing is said.
        """
        self._branching.check_text(text)
        return self._replies.start(lambda: self._new.message(self.tree, self.tree.tip, text))

    stop = delegated("_replies", Replies.stop)
    on_prefill = delegated("_replies", Replies.on_prefill)
    warmup = delegated("_replies", Replies.warmup)
    sample = delegated("_many", ManySampler.sample)
    sample_each = delegated("_many", ManySampler.sample_each)

    # --- branching off, and moving about ---------------------------------------------------------

    new_conversation = delegated("_branching", Branching.new_conversation)
    regenerate = delegated("_branching", Branching.regenerate)
    stream_regenerate = delegated("_branching", Branching.stream_regenerate)
    fork = delegated("_branching", Branching.fork)
    stream_fork = delegated("_branching", Branching.stream_fork)
    intervene = delegated("_branching", Branching.intervene)
    edit = delegated("_branching", Branching.edit)
    stream_edit = delegated("_branching", Branching.stream_edit)
    resume = delegated("_branching", Branching.resume)
    stream_resume = delegated("_branching", Branching.stream_resume)
    undo = delegated("_branching", Branching.undo)
    redo = delegated("_branching", Branching.redo)
    select = delegated("_branching", Branching.select)
    siblings = delegated("tree", ConversationTree.siblings)
    replay = delegated("_branching", Branching.replay)
    adopt = delegated("_branching", Branching.adopt)

    # --- inspection -----------------------------------------------------------------------------

    diff = delegated("_inspector", Inspector.diff)
    trace = delegated("_inspector", Inspector.trace)
    tokens = delegated("_inspector", Inspector.tokens)
    look = delegated("_inspector", Inspector.look)
    lens = delegated("_inspector", Inspector.lens)

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
        return self._replies.making

    @property
    def busy(self) -> bool:
        """Whether a reply is being made."""
        return self._core.lock.busy

    @property
    def cache_length(self) -> int:
        """Most positions of context."""
        return self._decoder.limit

    @property
    def cache_used(self) -> int:
        """Positions of context in use, on the active branch."""
        return self._replies.used

    @property
    def context(self) -> Context:
        """How full the context is: `fraction`, `nearly_full`, and a `warning` to show."""
        return self._replies.context

    @property
    def attention_kept(self) -> AttentionKept:
        """How many tokens have their `attention`, what it takes, and how many rows were evicted.

        Its `warning` is what there is to tell; the first time that something is evicted, it is also
        a ConversationWarning, at the end of the reply or before the next one.
        """
        return self._core.rows.kept

    @property
    def sampling(self) -> Sampling:
        """How the next reply is sampled."""
        return self._core.settings.sampling

    @sampling.setter
    def sampling(self, sampling: Sampling | Mapping[str, Any]) -> None:
        self._core.settings.sampling = sampling

    @property
    def system(self) -> str | None:
        """Text told to the model before the conversation; a change holds from the next reply on."""
        return self._core.settings.system

    @system.setter
    def system(self, system: str | None) -> None:
        self._core.settings.system = system

    @property
    def when_full(self) -> WhenFull:
        """Policy for a full context; a change holds from the next reply on."""
        return self._core.settings.when_full

    @when_full.setter
    def when_full(self, when_full: WhenFull) -> None:
        self._core.settings.when_full = when_full

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

    # --- files ----------------------------------------------------------------------------------

    save = delegated("_file", SessionFile.save)
    messages = delegated("_file", SessionFile.messages)
    export = delegated("_file", SessionFile.export)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: GemmaTransformer,
        tokenizer: Tokenizer,
        *,
        recompute: bool | None = None,
        template: str | Template | None = None,
        interventions: Sequence[type[Intervention]] = (),
        autosave: bool = False,
        progress: Callable[[float, str], None] | None = None,
    ) -> Self:
        """The conversation that `save` or `autosave` wrote, ready to go on.

        A reply that its kernel did not live to finish is there as far as it had come, with
        `finish_reason` "interrupted"; `resume` goes on with it.

        Args:
          path: the file.  What stands in the journal beside it is read as well.
          model: from `gnb.load`; the one that the conversation was held with.
          tokenizer: from `gnb.load`.
          recompute: what to do under another model, or after an edit or intervention.  None
            refuses.  True computes the evidence of every reply anew, by one pass of this model
            over each (texts and branches stay; where the tokenizer is another one, replies are
            tokenized anew).  False keeps the evidence as it was.
          template: in place of the one that the conversation was held in; needed where that is a
            class of your own.
          interventions: classes of your own that replies were made under (`intervene`).  Without
            them a ConversationWarning names them, and these replies can be read and saved again,
            but not traced or gone on with.
          autosave: go on saving to the same file.
          progress: called with a fraction and a sentence while evidence is recomputed.

        Raises:
          ConversationError: there is no such file, it is damaged, or of a later version.
          ModelMismatchError: the model or the tokenizer is another one; the message says what
            differs and what can be done.
        """
        now = Fingerprint.of(model, tokenizer)
        saved = session_file.read_for(
            model, now, path, recompute=recompute, interventions=interventions
        )
        chat = cls(model, tokenizer, **session_file.arguments(saved, model, template))
        if recompute:
            respell = saved.fingerprint.tokenizer != now.tokenizer
            Recomputation(chat._core).tree(saved.tree, respell=respell, progress=progress)
        chat.adopt(saved.tree)
        chat._file.opened(saved, now, recomputed=bool(recompute))
        if autosave:
            chat.autosave = chat._file.set_aside(saved)
        return chat

    @property
    def autosave(self) -> Path | None:
        """The file that the conversation is saved to while it goes on; None to save by hand.

        A path begins it: the file is written, and what is said is appended to a journal beside it
        within a second, also in the middle of a reply, on a thread of its own.  A kernel that dies
        loses no more than that; `load` reads both.  None ends it and folds the journal into the
        file, as happens too when the session or the kernel ends in good order.

        If the file cannot be written later on, the next reply begins with a ConversationWarning.
        So it does when somebody else has changed something there: what was deleted is written
        again; what was put there instead (another file, an older version, another session's) is
        left as it is, and the conversation is saved to a file beside it, which this property then
        names.  What cannot be written there at the end is written to the folder for temporary
        files.  Where the path is a link, what it leads to is written.

        Raises:
          ConversationError: when set: the file cannot be written, or exists and is not this
            conversation's.
        """
        return self._file.path

    @autosave.setter
    def autosave(self, path: str | os.PathLike[str] | None) -> None:
        self._file.autosave(path)

    @classmethod
    def from_messages(
        cls,
        model: GemmaTransformer,
        tokenizer: Tokenizer,
        messages: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
        *,
        evidence: bool = False,
        progress: Callable[[float, str], None] | None = None,
        **settings: Any,
    ) -> Self:
        """A conversation from messages in the common form, ready to go on.

        Args:
          model: from `gnb.load`.
          tokenizer: from `gnb.load`.
          messages: as `messages()` gives them, or the path of a JSON file with them; those of other
            programs, too, of which only roles and texts are read.  User and assistant speak by
            turns, the user first; a system message may lead.
          evidence: compute the evidence of the replies' tokens, by one pass over each.
          progress: called with a fraction and a sentence while that is done.
          **settings: further arguments of `ChatSession`; its `system` stands before the messages'.

        Raises:
          ConversationError: the file cannot be read, or has no such messages.
          ValueError: messages of another form.
          TextError: text that cannot be tokenized.
        """
        imported = imports.read_messages(messages)
        path = settings.pop("autosave", None)
        chat = cls(model, tokenizer, **{"system": imported.system, **settings})
        for turn in imported.tree:
            tokenizer.encode(turn.text)
        if evidence:
            Recomputation(chat._core).tree(imported.tree, progress=progress)
        chat.adopt(imported.tree)
        chat.autosave = path
        return chat

    keeper = property(operator.attrgetter("_file"), doc="File of the session, as scripts name it.")
