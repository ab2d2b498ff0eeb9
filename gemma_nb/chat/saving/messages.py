"""Import of messages as other programs write them: the common list, and ChatGPT's export."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from gemma_nb.cache import expanded
from gemma_nb.chat.saving import archive
from gemma_nb.chat.tree import ConversationTree
from gemma_nb.chat.turns import Turn
from gemma_nb.errors import ConversationError

_SYSTEM = ("system", "developer")
_ROLES = {"user": "user", "human": "user", "assistant": "model", "model": "model", "gpt": "model"}
# What messages of other programs are called, and what is in them that is text.
_LISTS = ("messages", "conversations", "conversation", "history")
_CONTENTS = ("content", "text", "value", "parts")
_ROLE_NAMES = ("role", "from", "author")
_NOTHING = ({"content_type": "text", "parts": [""]}, {"content_type": "text", "parts": []})
# What would be part of the conversation beside its text, and is lost if it is not read.
_MORE = ("tool_calls", "function_call", "audio", "images", "image", "attachments", "files")
_TEXT_PARTS = ("text", "input_text", "output_text", None)


@dataclasses.dataclass(frozen=True)
class Imported:
    """A list of messages as a conversation.

    Attributes:
      system: its system text; None where it has none.
      tree: its one branch.
    """

    system: str | None
    tree: ConversationTree


def read_messages(source: str | os.PathLike[str] | Iterable[Mapping[str, Any]]) -> Imported:
    """A conversation from a list of messages.

    Args:
      source: messages as `export.messages` gives them, by themselves or under "messages", or the
        path of a JSON file with such a list.  A content may also be a list of text parts, `{"type":
        "text", "text": ...}`.  Fields that are null, and what other programs note beside role and
        content, are left out.  The spellings "conversations", "from" and "value" are read, too, and
        a conversation as ChatGPT exports it: the branch that was shown.

    Raises:
      ConversationError: the file cannot be read, or holds no such list.
      ValueError: a message is not one of text, or the speakers do not take turns.
    """
    if not isinstance(source, str | os.PathLike):
        return _conversation(_listed(source))
    path = expanded(source)
    try:
        with archive.opened(path) as file:
            return _conversation(_listed(json.load(file)))
    except OSError as error:
        raise archive.unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"{path}: {error}") from error


def _listed(data: Any) -> list[Any]:
    if isinstance(data, list) and data and all(_is_export(item) for item in data):
        if len(data) > 1:
            raise ValueError(
                f"this holds {len(data)} conversations: pass one, such as json.load(file)[0]"
            )
        [data] = data
    found = data
    if isinstance(data, Mapping):
        found = next((data[name] for name in _LISTS if data.get(name) is not None), None)
        found = _branch(data) if found is None and _is_export(data) else found
    if isinstance(found, str | bytes | Mapping) or not isinstance(found, Iterable):
        raise ValueError('expected a list of messages, by itself or under "messages"')
    return list(found)


def _is_export(data: Any) -> bool:
    """Whether it is a conversation as ChatGPT exports it: a tree of messages."""
    return isinstance(data, Mapping) and isinstance(data.get("mapping"), Mapping)


def _branch(data: Mapping[str, Any]) -> list[Any]:
    """The messages of the branch that is shown, without those that say nothing."""
    found: list[Any] = []
    seen: set[Any] = set()
    at = data.get("current_node")
    while isinstance(at, str) and at not in seen and isinstance(data["mapping"].get(at), Mapping):
        seen.add(at)
        node = data["mapping"][at]
        found.append(node.get("message"))
        at = node.get("parent")
    said = [message for message in found[::-1] if isinstance(message, Mapping)]
    return [message for message in said if _first(message, _CONTENTS) not in _NOTHING]


def _conversation(listed: list[Any]) -> Imported:
    system: str | None = None
    tree = ConversationTree()
    node = tree.root
    for index, message in enumerate(listed):
        role, text = _message(message, f"message {index}")
        if role in _SYSTEM:
            if len(tree):
                raise ValueError(f"message {index}: a system message can only be the first one")
            system = text if system is None else f"{system}\n\n{text}"
            continue
        expected = "model" if len(tree) % 2 else "user"
        if _ROLES[role] != expected:
            names = {"user": "user", "model": "assistant"}
            raise ValueError(
                f"message {index}: expected the {names[expected]}, got {role!r}: user and "
                "assistant speak by turns, the user first"
            )
        turn = Turn(id=len(tree) + 1, role=expected, text=text)  # type: ignore[arg-type]
        if expected == "model":
            detail = "The reply was imported."
            turn = dataclasses.replace(turn, finish_reason="edited", finish_detail=detail)
        node = tree.add(node, turn)
    return Imported(system, tree)


def _message(message: Any, where: str) -> tuple[str, str]:
    """Its role and text; what else other programs note (ids, times, models) is left out."""
    role = _first(message, _ROLE_NAMES) if isinstance(message, Mapping) else None
    if role is None:
        raise ValueError(f'{where}: expected {{"role": ..., "content": ...}}, got {message!r:.60}')
    role = role.get("role") if isinstance(role, Mapping) else role
    role = role.strip().lower() if isinstance(role, str) else role
    if not isinstance(role, str) or role not in (*_SYSTEM, *_ROLES):
        known = ", ".join((*_SYSTEM, *_ROLES))
        raise ValueError(f"{where}: expected a role of {known}, got {role!r:.60}")
    more = [name for name in _MORE if message.get(name)]
    if more:
        raise ValueError(f"{where}: expected text only, got also {', '.join(more)}")
    content = _first(message, _CONTENTS)
    if isinstance(content, Mapping):
        content = content["parts"] if content.get("content_type") == "text" else [content]
    if isinstance(content, list | tuple):
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{where}: expected text as its content, got {content!r:.60}")
    return role, content


def _first(fields: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The first of these fields that is not null."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _part(part: Any, where: str) -> str:
    """A part of a message's content: a text, by itself or with its type."""
    if isinstance(part, str):
        return part
    kind = (
        _first(part, ("type", "content_type")) if isinstance(part, Mapping) else type(part).__name__
    )
    if not isinstance(part, Mapping) or kind not in _TEXT_PARTS:
        raise ValueError(
            f"{where}: expected parts of type 'text' only, got one of type {kind!r:.40}: images "
            "and files are not read; leave it out, or say in words what it shows"
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected text in its part, got {part!r:.60}")
    return text
