"""Write a conversation down: the whole of it, and later what changed since."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args, get_origin

import safetensors.numpy

from gemma_nb import __version__
from gemma_nb.chat.node import Node
from gemma_nb.chat.saving import archive, codec, interventions, journal
from gemma_nb.chat.saving.codec import Tables
from gemma_nb.chat.saving.columns import Columns, to_columns
from gemma_nb.chat.saving.fingerprint import Fingerprint
from gemma_nb.chat.saving.protocol import Partial, SavedSession, Settings
from gemma_nb.chat.saving.token_columns import write_tokens
from gemma_nb.chat.tokens import Tokens
from gemma_nb.chat.tree import ConversationTree
from gemma_nb.chat.turns import Turn
from gemma_nb.text.template import Template, template_class

FORMAT, VERSION = "gemma_nb conversation", 1
NODE_FIELDS = ("active", "undone")  # of a node, beside its turn and children


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
        """Everything new or different since the last call, and its evidence.

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
                changed, arrays = interventions.encode(tree.interventions.get(node.id))
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
    fields = tuple((name, getattr(node, name)) for name in NODE_FIELDS)
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
            if evidence and hint is Tokens:
                columns |= write_tokens(value, tables, name)
            elif evidence:
                columns |= to_columns(get_args(hint)[0], value, tables, name)
    return data, columns


def is_evidence(hint: Any) -> bool:
    """Whether a field of a turn is many records: those are columns, not JSON."""
    if hint is Tokens:
        return True
    return get_origin(hint) is tuple and dataclasses.is_dataclass(get_args(hint)[0])


def header(
    fingerprint: Fingerprint, conversation: str, generation: str, previous: str | None
) -> dict[str, Any]:
    """The first members of conversation.json."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "written_by": f"gemma_nb {__version__}",
        "conversation": conversation,
        "generation": generation,
        "previous": previous,
        "identity": dataclasses.asdict(fingerprint),
    }


def save(
    session: SavedSession, path: Path, conversation: str, fingerprint: Fingerprint | None = None
) -> str:
    """Writes the whole conversation to `path`, which is replaced in one step.

    Args:
      session: what to write.
      path: the file.
      conversation: see the format.
      fingerprint: of the model that the evidence is of; None is the session's.

    Returns:
      The generation written.

    Raises:
      ConversationError: it cannot be written.
    """
    changes, blobs = Encoder().changes(session.tree, Settings.of(session), session.template)
    structure = {"turns": {}, "strings": [], "lists": [], **changes}
    generation = new_id()
    fingerprint = fingerprint or Fingerprint.of(session.model, session.tokenizer)
    head = header(fingerprint, conversation, generation, None)
    archive.write(path, {**head, **structure}, ((int(i), blob) for i, blob in blobs.items()))
    # The journal of what stood here before continues nothing now.
    journal.remove(path)
    return generation
