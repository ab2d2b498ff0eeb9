"""A conversation as a file: every branch, the evidence of every token, and the settings.

The file is a zip whose members are stored without compression, so any tool can open it:

    conversation.json          the structure: settings, texts, branches
    evidence/<id>.safetensors  the evidence of the turn with this id, where it has any

conversation.json, format version 1, is one object:

    format, version    "gemma_nb conversation", 1
    written_by         "gemma_nb 0.1.0"
    conversation       32 hexadecimal digits, drawn once: the same in every copy of a conversation
    generation         32 hexadecimal digits, drawn anew each time that the file is written
    previous           the generation that stood here before; null where there was none
    identity           the model and tokenizer of the evidence: name, title, config, weights,
                       tokenizer (see `gemma_nb.chat.identity.Identity`)
    settings           system, sampling, template, capture, cache_length, ...: the arguments of
                       `ChatSession`.  A template is {"name", "fields"}, or {"name", "own"} with
                       the class of one that is not this package's
    nodes              id -> {"children": [ids], "active": index or null, ...}.  "0" is the root;
                       any other node has the id of its turn.  Children are in the order in which
                       they were made; the active one is shown.  Other fields as of
                       `gemma_nb.chat.tree.Node`
    turns              id -> the fields of `gemma_nb.chat.events.Turn`.  A field with evidence is
                       {"rows": n} and its rows are in the turn's safetensors file
    under              id -> the interventions that a reply was computed under, where these are not
                       the model's own; `gemma_nb.chat.altered` says how
    strings            texts of tokens, to which the evidence refers by index, and others that are
                       stored once, to which this file refers by {"string": index}
    lists              long lists of integers, to which this file refers by {"list": index}

A reply's safetensors file has one array per column: `tokens.token_id`, `tokens.logprob`,
`tokens.entropy`, `tokens.rank`, `tokens.position`, `tokens.alternatives.count`, and so on, by the
fields of `TokenRecord` and `Alternative`; `gemma_nb.chat.columns` says how.  Integers are in the
smallest dtype that holds them; floats in float32, as they were computed, or in float64 where that
would change one.

While a conversation is saved as it goes on, what happened since the file was written stands in the
journal beside it, `<file>.journal` (see `gemma_nb.chat.journal`), whose header names the generation
that it continues.  The JSON of a record has what changed in conversation.json: new or changed
`nodes`, `turns` and `under`, all `settings`, what `strings` and `lists` have more; its blobs are
the turns' safetensors.  The reply being made is `partial`, {"parent", "start", "turn"}, and the
blob "partial" has its tokens from `start` on.  Loading reads both files.  When the journal has
grown, it is folded into the file, which is replaced as a whole.

A program reads versions up to its own; a new version is given when an older program could no longer
read a file rightly.  Nothing is pickled, no name from the file is ever imported or opened.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

import safetensors.numpy

from gemma_nb import __version__
from gemma_nb.chat import altered, archive, codec, journal
from gemma_nb.chat.codec import Tables
from gemma_nb.chat.columns import Columns, to_columns
from gemma_nb.chat.context import WhenFull
from gemma_nb.chat.events import Turn
from gemma_nb.chat.identity import Identity
from gemma_nb.chat.tree import ConversationTree, Node
from gemma_nb.sampling.settings import Capture, Sampling
from gemma_nb.text.template import Template, template_class

if TYPE_CHECKING:
    from gemma_nb.chat.conversation import Conversation

FORMAT, VERSION = "gemma_nb conversation", 1
LINKS = ("turn", "parent", "children")  # of a node; stored by ids


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a session was made with.

    Attributes:
      system, sampling, cache_length, capture, when_full: as of `ChatSession`.
    """

    system: str | None
    sampling: Sampling
    cache_length: int
    capture: Capture
    when_full: WhenFull = "stop"

    @classmethod
    def of(cls, chat: Conversation) -> Settings:
        """The settings of a session."""
        return cls(**{name: getattr(chat, name) for name in codec.hints(cls)})

    def fields(self) -> dict[str, Any]:
        """Them, as the arguments of `ChatSession`."""
        return {name: getattr(self, name) for name in codec.hints(type(self))}


@dataclasses.dataclass(frozen=True)
class Partial:
    """A reply in the making.

    Attributes:
      parent: id of the node that it follows.
      turn: as far as it has come.
    """

    parent: int
    turn: Turn


def new_id() -> str:
    """A name for a conversation, or for a generation of its file."""
    return secrets.token_hex(16)


# --- writing --------------------------------------------------------------------------------------


class Encoder:
    """Writes a conversation down, and later what changed since.

    Attributes:
      tables: what has been stored once.
    """

    def __init__(self) -> None:
        self.tables = Tables()
        self._strings = self._lists = 0  # how many of them are written
        self._turns: dict[int, Turn] = {}
        self._nodes: dict[int, tuple[Any, ...]] = {}
        self._under: dict[str, Any] = {}
        self._settings: Any = None
        self._partial: tuple[int, int] | None = None  # id, tokens written

    @property
    def turns(self) -> Collection[int]:
        """Ids of the turns that were written."""
        return self._turns.keys()

    def structure(self) -> dict[str, Any]:
        """All that was written so far, as conversation.json has it; the evidence stays as it is."""
        turns = self._turns.items()
        return {
            "settings": self._encoded_settings(),
            "nodes": {str(id_): self._node(links) for id_, links in self._nodes.items()},
            "turns": {str(i): encode_turn(t, self.tables, evidence=False)[0] for i, t in turns},
            "under": self._under,
            "strings": self.tables.strings,
            "lists": self.tables.lists,
        }

    def changes(
        self,
        tree: ConversationTree,
        settings: Settings,
        template: Template,
        partial: Partial | None = None,
    ) -> tuple[dict[str, Any], dict[str, bytes]]:
        """What is new or different since the last call, and its evidence.

        The tree may grow meanwhile, on another thread: what comes too late comes the next time.
        """
        changes: dict[str, Any] = {}
        blobs: dict[str, bytes] = {}
        nodes: dict[str, Any] = {}
        turns: dict[str, Any] = {}
        under: dict[str, Any] = {}
        stack = [tree.root]
        while stack:
            node = stack.pop()
            links = _links(node)
            if self._nodes.get(node.id) != links:
                nodes[str(node.id)], self._nodes[node.id] = self._node(links), links
            if node.turn is not None and self._turns.get(node.id) is not node.turn:
                data, columns = encode_turn(node.turn, self.tables)
                turns[str(node.id)], self._turns[node.id] = data, node.turn
                changed, arrays = altered.encode(tree.under.get(node.id))
                if changed is not None:
                    under[str(node.id)] = self._under[str(node.id)] = changed
                    columns |= arrays
                if columns:
                    blobs[str(node.id)] = safetensors.numpy.save(columns)
            # A child that came after the links were noted is written with them, the next time.
            stack.extend(node.children[: len(links[0])][::-1])
        if nodes:
            changes["nodes"] = nodes
        if turns:
            changes["turns"] = turns
        if under:
            changes["under"] = under
        if self._settings != (settings, template):
            self._settings = (settings, template)
            changes["settings"] = self._encoded_settings()
        self._add_partial(partial, changes, blobs)
        for name in ("strings", "lists"):
            known, written = getattr(self.tables, name), getattr(self, f"_{name}")
            if len(known) > written:
                changes[name] = known[written:]
                setattr(self, f"_{name}", len(known))
        return changes, blobs

    def _add_partial(
        self, partial: Partial | None, changes: dict[str, Any], blobs: dict[str, bytes]
    ) -> None:
        """Notes the tokens that the reply being made has more."""
        if partial is None or not partial.turn.tokens or partial.turn.id in self._turns:
            return
        turn = partial.turn
        before = self._partial or (turn.id, 0)
        start = before[1] if before[0] == turn.id else 0
        if start >= len(turn.tokens) and self._partial is not None:
            return
        # Its ids are those of its tokens until it ends; no need to write them again and again.
        new = dataclasses.replace(turn, tokens=turn.tokens[start:], ids=None)
        data, columns = encode_turn(new, self.tables)
        changes["partial"] = {"parent": partial.parent, "start": start, "turn": data}
        blobs["partial"] = safetensors.numpy.save(columns)
        self._partial = (turn.id, len(turn.tokens))

    def _node(self, links: tuple[Any, ...]) -> dict[str, Any]:
        children, fields = links
        return {"children": list(children), **codec.to_json(dict(fields), self.tables)}

    def _encoded_settings(self) -> dict[str, Any]:
        settings, template = self._settings
        data = codec.to_json(settings, self.tables)
        kind = type(template)
        entry: dict[str, Any] = {"name": kind.name}
        if template_class(kind.name) is kind:
            entry["fields"] = codec.to_json(template, self.tables)
        else:
            entry["own"] = f"{kind.__module__}.{kind.__qualname__}"
        return {**data, "template": entry}


def _links(node: Node) -> tuple[Any, ...]:
    """A node's children, by ids, and its other fields.

    Fields first: an index into the children is then never beyond those that are noted.
    """
    names = [name for name in (f.name for f in dataclasses.fields(Node)) if name not in LINKS]
    fields = tuple((name, getattr(node, name)) for name in names)
    return tuple(child.id for child in tuple(node.children)), fields


def encode_turn(
    turn: Turn, tables: Tables, *, evidence: bool = True
) -> tuple[dict[str, Any], Columns]:
    """A turn's JSON and the columns of its evidence."""
    data: dict[str, Any] = {}
    columns: Columns = {}
    for name, hint in codec.hints(Turn).items():
        value = getattr(turn, name)
        if not is_evidence(hint):
            data[name] = codec.to_json(value, tables)
        elif value:
            data[name] = {"rows": len(value)}
            if evidence:
                columns |= to_columns(get_args(hint)[0], value, tables, name)
    return data, columns


def is_evidence(hint: Any) -> bool:
    """Whether a field of a turn is many records: those are columns, not JSON."""
    return get_origin(hint) is tuple and dataclasses.is_dataclass(get_args(hint)[0])


def header(
    identity: Identity, conversation: str, generation: str, previous: str | None
) -> dict[str, Any]:
    """The first members of conversation.json."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "written_by": f"gemma_nb {__version__}",
        "conversation": conversation,
        "generation": generation,
        "previous": previous,
        "identity": dataclasses.asdict(identity),
    }


def save(
    chat: Conversation, path: Path, conversation: str, identity: Identity | None = None
) -> str:
    """Writes the whole conversation to `path`, which is replaced in one step.

    Args:
      chat: the session.
      path: what to write.
      conversation: see the format.
      identity: of the model that the evidence is of; None is the session's.

    Returns:
      The generation written.

    Raises:
      ConversationError: it cannot be written.
    """
    changes, blobs = Encoder().changes(chat.tree, Settings.of(chat), chat.template)
    structure = {"turns": {}, "strings": [], "lists": [], **changes}
    generation = new_id()
    identity = identity or Identity.of(chat.model, chat.tokenizer)
    head = header(identity, conversation, generation, None)
    archive.write(path, {**head, **structure}, ((int(i), blob) for i, blob in blobs.items()))
    # The journal of what stood here before continues nothing now.
    journal.remove(path)
    return generation
