"""Conversations as other programs read them: Markdown, and the common list of messages."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_nb.chat import archive
from gemma_nb.chat.events import Turn
from gemma_nb.chat.tree import ConversationTree
from gemma_nb.errors import ConversationError

if TYPE_CHECKING:
    from gemma_nb.chat.conversation import Conversation

_FORMATS = {".md": "markdown", ".markdown": "markdown", ".json": "json"}
_SYSTEM = ("system", "developer")
_ROLES = {"user": "user", "assistant": "model", "model": "model"}
# A reply that came to its end needs no remark.
_ENDED = (None, "stop", "edited")


def messages(chat: Conversation) -> list[dict[str, str]]:
    """The active branch as `{"role": "system" | "user" | "assistant", "content": text}`.

    The system text is there unless it is the template's own, which other programs do not need.
    """
    own = chat.template.default_system
    system = chat.system if chat.system != own else None
    lead = [{"role": "system", "content": system}] if system else []
    roles = {"user": "user", "model": "assistant"}
    return [*lead, *({"role": roles[turn.role], "content": turn.text} for turn in chat.turns)]


def export(chat: Conversation, to: str | os.PathLike[str] = "markdown") -> str:
    """See `ChatSession.export`."""
    if to in ("markdown", "json"):
        return _text(chat, str(to))
    path = Path(to).expanduser()
    form = _FORMATS.get(path.suffix.lower())
    if form is None:
        raise ValueError(
            f"expected 'markdown', 'json' or a path that ends in {', '.join(_FORMATS)}; got "
            f"{os.fspath(to)!r}"
        )
    text = _text(chat, form)
    with archive.replacing(path.absolute()) as file:
        file.write(text.encode("utf-8"))
    return text


def _text(chat: Conversation, form: str) -> str:
    if form == "json":
        return json.dumps(messages(chat), ensure_ascii=False, indent=2) + "\n"
    return _markdown(chat)


def _markdown(chat: Conversation) -> str:
    title = chat.model.title
    parts = [f"# Conversation with {title}"]
    for message in messages(chat):
        if message["role"] == "system":
            parts.append("\n".join(f"> {line}".rstrip() for line in message["content"].split("\n")))
    for turn in chat.turns:
        parts += [f"## {'User' if turn.role == 'user' else title}", turn.text.strip()]
        if turn.finish_reason not in _ENDED:
            parts.append(f"*{turn.finish_detail}*")
    return "\n\n".join(part for part in parts if part) + "\n"


# --- import ---------------------------------------------------------------------------------------


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
      source: messages as `messages` gives them, by themselves or under "messages", or the path of
        a JSON file with such a list.  A content may also be a list of text parts,
        `{"type": "text", "text": ...}`.

    Raises:
      ConversationError: the file cannot be read, or holds no such list.
      ValueError: a message is not one of text, or the speakers do not take turns.
    """
    if not isinstance(source, str | os.PathLike):
        return _conversation(_listed(source))
    path = Path(source).expanduser()
    try:
        with archive.opened(path) as file:
            return _conversation(_listed(json.load(file)))
    except OSError as error:
        raise archive.unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"{path}: {error}") from error


def _listed(data: Any) -> list[Any]:
    found = data.get("messages") if isinstance(data, Mapping) else data
    if isinstance(found, str) or not isinstance(found, Iterable):
        raise ValueError('expected a list of messages, by itself or under "messages"')
    return list(found)


def _conversation(listed: list[Any]) -> Imported:
    system: str | None = None
    tree = ConversationTree()
    node = tree.root
    for index, message in enumerate(listed):
        role, text = _message(message, f"message {index}")
        if role in _SYSTEM:
            if index:
                raise ValueError(f"message {index}: a system message can only be the first one")
            system = text
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
    """Its role and text."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(f'{where}: expected {{"role": ..., "content": ...}}, got {message!r:.60}')
    role = message["role"]
    if role not in (*_SYSTEM, *_ROLES):
        known = ", ".join((*_SYSTEM, *_ROLES))
        raise ValueError(f"{where}: expected a role of {known}, got {role!r}")
    more = sorted(k for k, v in message.items() if v and k not in ("role", "content", "name"))
    if more:
        raise ValueError(f"{where}: expected text only, got also {', '.join(map(str, more))}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{where}: expected text as its content, got {content!r:.60}")
    return role, content


def _part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        raise ValueError(f"{where}: expected parts of type 'text' only, got {part!r:.60}")
    text = part.get("text")
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected text, got {text!r:.60}")
    return text
