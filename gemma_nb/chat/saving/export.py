"""Export for other programs: Markdown, and the common list of messages."""

from __future__ import annotations

import json
import os

from gemma_nb.cache import expanded
from gemma_nb.chat.saving import archive
from gemma_nb.chat.saving.protocol import SavedSession

_FORMATS = {".md": "markdown", ".markdown": "markdown", ".json": "json"}
# A reply that came to its end needs no remark.
_ENDED = (None, "stop", "edited")


def messages(session: SavedSession) -> list[dict[str, str]]:
    """The active branch as `{"role": "system" | "user" | "assistant", "content": text}`.

    The system text is there unless it is the template's own, which other programs do not need.
    """
    own = session.template.default_system
    system = session.system if session.system != own else None
    lead = [{"role": "system", "content": system}] if system else []
    roles = {"user": "user", "model": "assistant"}
    return [*lead, *({"role": roles[turn.role], "content": turn.text} for turn in session.turns)]


def export(session: SavedSession, to: str | os.PathLike[str] = "markdown") -> str:
    """The active branch as text, written to a file where `to` is one; see `ChatSession.export`."""
    if to in ("markdown", "json"):
        return _text(session, str(to))
    path = expanded(to)
    form = _FORMATS.get(path.suffix.lower())
    if form is None:
        raise ValueError(
            f"expected 'markdown', 'json' or a path that ends in {', '.join(_FORMATS)}; got "
            f"{os.fspath(to)!r}"
        )
    text = _text(session, form)
    with archive.replacing(path.absolute()) as file:
        file.write(text.encode("utf-8"))
    return text


def _text(session: SavedSession, form: str) -> str:
    if form == "json":
        return json.dumps(messages(session), ensure_ascii=False, indent=2) + "\n"
    return _markdown(session)


def _markdown(session: SavedSession) -> str:
    title = session.model.title
    parts = [f"# Conversation with {title}"]
    for message in messages(session):
        if message["role"] == "system":
            parts.append("\n".join(f"> {line}".rstrip() for line in message["content"].split("\n")))
    for turn in session.turns:
        parts += [f"## {'User' if turn.role == 'user' else title}", turn.text.strip()]
        if turn.finish_reason not in _ENDED:
            parts.append(f"*{turn.finish_detail}*")
    return "\n\n".join(part for part in parts if part) + "\n"
