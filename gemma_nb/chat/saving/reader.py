"""Read a saved conversation back; `gemma_nb.chat.saving` describes the format."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import safetensors
import safetensors.numpy

from gemma_nb.chat.node import Node
from gemma_nb.chat.saving import archive, codec, interventions, journal
from gemma_nb.chat.saving.codec import Tables
from gemma_nb.chat.saving.columns import Columns, from_columns
from gemma_nb.chat.saving.fingerprint import Fingerprint
from gemma_nb.chat.saving.protocol import Settings
from gemma_nb.chat.saving.token_columns import read_tokens
from gemma_nb.chat.saving.writer import FORMAT, NODE_FIELDS, VERSION, is_evidence
from gemma_nb.chat.tokens import Tokens
from gemma_nb.chat.tree import ConversationTree
from gemma_nb.chat.turns import Context, Origin, Turn
from gemma_nb.chat.user_warnings import warn_user
from gemma_nb.errors import ConversationError, ConversationWarning
from gemma_nb.interventions import Intervention
from gemma_nb.text.template import Template, template_class

_DAMAGE = (*archive.DAMAGE, safetensors.SafetensorError)


@dataclasses.dataclass(frozen=True)
class Saved:
    """Contents of a file.

    Attributes:
      path: where it is.
      conversation, generation: see the format.
      fingerprint: of the model and the tokenizer of its evidence.
      settings: of its session.
      template: its template; a string names a class that is not this package's.
      tree: all branches.
      recovered: whether the end of the last reply is missing, since its kernel ended.
      left_out: whether something in its journal was left out.
    """

    path: Path
    conversation: str
    generation: str
    fingerprint: Fingerprint
    settings: Settings
    template: Template | str
    tree: ConversationTree
    recovered: bool = False
    left_out: bool = False


def read(path: Path, classes: Sequence[type[Intervention]] = ()) -> Saved:
    """The conversation at `path`, with what its journal has more.

    Args:
      path: the file.
      classes: of the user's own interventions.

    Raises:
      ConversationError: there is none, it is damaged, or of a later version.
    """
    structure, evidence = archive.read(path)
    _check_version(path, structure)
    try:
        partial, left_out = _continue(path, structure, evidence)
        with _no_collection():
            return _decode(path, structure, evidence, partial, left_out, classes)
    except _DAMAGE as error:
        raise archive.damaged(path, error) from error


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Half of the time would go into looking for garbage among records that all stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_version(path: Path, structure: dict[str, Any]) -> None:
    form, version = structure.get("format"), structure.get("version")
    if form != FORMAT or type(version) is not int or version < 1:
        raise archive.damaged(
            path, f"expected format {FORMAT!r} with a version, got {form!r} and {version!r}"
        )
    if version > VERSION:
        raise ConversationError(
            f"{path} has version {version} of the format, written by "
            f"{structure.get('written_by')}; this gemma_nb reads versions up to {VERSION}.  Update "
            "gemma_nb to load it"
        )


def _continue(path: Path, structure: dict[str, Any], blobs: dict[int, bytes]) -> tuple[Any, bool]:
    """Adds to `structure` and `blobs` what the journal has.

    Returns:
      The reply that it breaks off in, and whether anything was left out.
    """
    beside = journal.path_of(path)
    more = journal.read(beside)
    if more is None or more.generation == structure.get("previous"):
        return None, False  # the latter is contained: the process ended between two steps
    if more.generation != structure["generation"]:
        warn_user(
            f"{beside} continues another version of {path.name} and was left out",
            ConversationWarning,
        )
        return None, True
    if more.damaged:
        warn_user(
            f"{beside} is damaged: {more.damaged:,} bytes at its end were left out, and with them "
            "what was said last",
            ConversationWarning,
        )
    partial: Any = None
    for changes, new in more.records:
        for name in ("nodes", "turns", "under"):
            structure.setdefault(name, {}).update(changes.get(name, {}))
        for name in ("strings", "lists"):
            structure[name].extend(changes.get(name, ()))
        structure["settings"] = changes.get("settings", structure["settings"])
        for name, blob in new.items():
            if name != "partial":
                blobs[int(name)] = blob
        if "partial" in changes:
            start = changes["partial"]["start"]
            parts = [] if start == 0 or partial is None else partial[1]
            partial = (changes["partial"], [*parts, (start, new["partial"])])
    return partial, more.damaged > 0


def _decode(
    path: Path,
    structure: Any,
    blobs: dict[int, bytes],
    partial: Any,
    left_out: bool,
    classes: Sequence[type[Intervention]],
) -> Saved:
    lists = [tuple(_integers(items)) for items in structure["lists"]]
    tables = Tables(codec.from_json(list[str], structure["strings"], Tables(), "strings"), lists)
    fingerprint = codec.from_json(Fingerprint, structure["identity"], tables, "identity")
    settings = dict(structure["settings"])
    template = _template(settings.pop("template"), tables)
    turns = {}
    for key, data in structure["turns"].items():
        columns = _columns(blobs.get(int(key), b""))
        turns[int(key)] = decode_turn(data, columns, tables, f"turns.{key}")
    tree = _tree(structure["nodes"], turns, tables)
    for key, data in structure.get("under", {}).items():
        arrays = _columns(blobs.get(turns[int(key)].id, b""))
        tree.interventions[int(key)] = interventions.decode(data, arrays, f"under.{key}", classes)
    recovered = partial is not None and _recover(tree, partial[0], partial[1], tables)
    recovered = _answer(tree) or recovered
    return Saved(
        path=path,
        conversation=_hexadecimal(structure["conversation"]),
        generation=_hexadecimal(structure["generation"]),
        fingerprint=fingerprint,
        settings=_settings(settings, tables),
        template=template,
        tree=tree,
        recovered=recovered,
        left_out=left_out,
    )


def _tree(nodes: dict[str, Any], turns: dict[int, Turn], tables: Tables) -> ConversationTree:
    hints = {name: codec.hints(Node)[name] for name in NODE_FIELDS}
    tree = ConversationTree()
    fields: list[tuple[Node, dict[str, Any]]] = []
    stack: list[tuple[Node | None, int]] = [(None, 0)]
    while stack:
        parent, id_ = stack.pop()
        if parent is not None and turns[id_].id != id_:
            raise ValueError(f"turns.{id_}: its id is {turns[id_].id}")
        node = tree.root if parent is None else tree.attach(parent, turns[id_])
        data = dict(nodes[str(id_)])
        children = _integers(data.pop("children"))
        stack.extend((node, child) for child in reversed(children))
        where = f"nodes.{id_}"
        fields.append(
            (node, {k: codec.from_json(hints[k], v, tables, where) for k, v in data.items()})
        )
    if len(fields) != len(turns) + 1:
        raise ValueError(f"expected {len(turns)} turns in the tree, got {len(fields) - 1}")
    for node, values in fields:
        for name, value in values.items():
            setattr(node, name, value)
        _check_indices(node)
        _check_turn(node)
    tree.show_after(tree.root, tree.root.active)  # and what was active after that
    return tree


def _check_indices(node: Node) -> None:
    for name in ("active", "undone"):
        index = getattr(node, name)
        if index is not None and not 0 <= index < len(node.children):
            count = len(node.children)
            raise ValueError(f"nodes.{node.id}.{name}: expected one of {count}, got {index}")


def _check_turn(node: Node) -> None:
    """Refuses numbers that no reply can have, and text that no tokenizer takes."""
    turn = node.turn
    if turn is None:
        return
    origin, context, timing = (
        turn.origin or Origin("edit", 0),
        turn.context or Context(),
        turn.timing,
    )
    seconds = (timing.prefill_seconds, timing.decode_seconds)
    counts = {
        "timing.prompt_tokens": timing.prompt_tokens,
        "timing.new_tokens": timing.new_tokens,
        "origin.turn": origin.turn,
        "origin.index": origin.index,
        "origin.given": origin.given,
        "context.used": context.used,
        "context.length": context.length,
    }
    where = f"turns.{turn.id}"
    for name, count in counts.items():
        codec.expect(0 <= count < 2**63, "a number from 0 on", count, f"{where}.{name}")
    codec.expect(all(0 <= s < math.inf for s in seconds), "seconds", seconds, f"{where}.timing")
    if turn.context is not None:
        path, dropped = [n.role for n in node.path()], context.dropped
        begins = 0 <= dropped < len(path) and path[dropped] == "user"
        wanted = "how many turns were left out, up to one of the user's"
        codec.expect(begins, wanted, dropped, f"{where}.context.dropped")
    for name, text in {"text": turn.text, "context.system": context.system or ""}.items():
        codec.expect(_is_text(text), "text without lone surrogates", text, f"{where}.{name}")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _recover(tree: ConversationTree, data: Any, parts: list[Any], tables: Tables) -> bool:
    """Adds the reply that was being made when the process ended, as far as it was written."""
    if any(turn.id == data["turn"].get("id") for turn in tree):
        return False  # it came to its end
    parent = tree.root if data["parent"] == 0 else tree.find(data["parent"])
    tokens = Tokens()
    for start, blob in parts:
        columns = _columns(blob)
        rows = len(columns["tokens.token_id"])
        tokens = tokens[:start] + read_tokens(rows, columns, tables, "tokens")
    rest = {name: value for name, value in data["turn"].items() if name != "tokens"}
    turn = decode_turn(rest, {}, tables, "partial")
    ended = dataclasses.replace(
        turn,
        tokens=tokens,
        ids=tuple(tokens.token_id.tolist()),
        finish_reason="interrupted",
        finish_detail="The kernel ended while this reply was being made.",
    )
    _check_turn(tree.add(parent, ended))
    return True


def _answer(tree: ConversationTree) -> bool:
    """Ends replies of which not one token was written: user and model speak by turns."""
    found = False
    for node in list(tree.nodes()):
        if node.turn is None or node.turn.role != "user":
            continue
        if not node.children:
            found = True
            detail = "The kernel ended before this reply began."
            turn = Turn(tree.last_id + 1, "model", "", ids=(), finish_reason="interrupted")
            tree.attach(node, dataclasses.replace(turn, finish_detail=detail))
        if node.active is None:
            tree.show_after(node, len(node.children) - 1)
    return found


def _columns(blob: bytes) -> Columns:
    return safetensors.numpy.load(blob) if blob else {}


def _settings(data: Any, tables: Tables) -> Settings:
    settings: Settings = codec.from_json(Settings, data, tables, "settings")
    length, system = settings.cache_length, settings.system or ""
    codec.expect(2 <= length < 2**63, "a length from 2 on", length, "settings.cache_length")
    codec.expect(_is_text(system), "text without lone surrogates", system, "settings.system")
    return settings


def _template(data: Any, tables: Tables) -> Template | str:
    if "own" in data:
        return str(data["own"])
    return codec.from_json(
        template_class(data["name"]), data["fields"], tables, "settings.template"
    )


def _integers(items: Any) -> list[int]:
    return codec.from_json(list[int], items, Tables(), "a list of integers")


def _hexadecimal(value: Any) -> str:
    if not isinstance(value, str) or len(value) != 32 or not set(value) <= set("0123456789abcdef"):
        raise ValueError(f"expected 32 hexadecimal digits, got {value!r}")
    return value


def decode_turn(data: Any, columns: Columns, tables: Tables, where: str) -> Turn:
    """The turn that `encode_turn` was given.

    Raises:
      ValueError: `data` or `columns` are not of a turn.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {data!r}")
    fields = codec.hints(Turn)
    plain = {name: value for name, value in data.items() if not is_evidence(fields.get(name))}
    turn: Turn = codec.from_json(Turn, plain, tables, where)
    rows: dict[str, Any] = {}
    for name in data.keys() - plain.keys():
        count = data[name].get("rows") if isinstance(data[name], dict) else None
        if type(count) is not int or count < 0:
            raise ValueError(f"{where}.{name}: expected a number of rows, got {data[name]!r}")
        if fields[name] is Tokens:
            rows[name] = read_tokens(count, columns, tables, name)
        else:
            hint = get_args(fields[name])[0]
            rows[name] = tuple(from_columns(hint, count, columns, tables, name))
    return dataclasses.replace(turn, **rows)
