"""Static HTML of a conversation that holds without a kernel: no scripts, everything escaped.

It works on the encoded turns of `transcript.py`, and reads well where styles are stripped, too.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

_STYLE = """
.gnb-record{max-width:46em;font:13px/1.5 system-ui,sans-serif;
color:var(--jp-ui-font-color1,#1c2126)}
.gnb-record .who{font-size:11px;color:var(--jp-ui-font-color2,#5c6670);margin:8px 0 0}
.gnb-record .said{white-space:pre-wrap;margin:0}
.gnb-record .tok{border-bottom:2px solid transparent}
.gnb-record .mark{font:10px ui-monospace,monospace;color:var(--jp-ui-font-color2,#5c6670);
border:1px solid var(--jp-border-color2,#dfe3e8);border-radius:4px;padding:0 3px}
.gnb-record table{border-collapse:collapse;font:12px ui-monospace,monospace}
.gnb-record td,.gnb-record th{border:1px solid var(--jp-border-color2,#dfe3e8);padding:1px 6px;
text-align:left}
"""


def escape(text: str) -> str:
    """`text` for HTML content and attributes; line breaks become references so that they hold."""
    return html.escape(text, quote=True).replace("\n", "&#10;")


def visible(text: str) -> str:
    """`text` with its spaces and line breaks shown."""
    return text.replace("\n", "⏎").replace(" ", "·").replace("\t", "⇥")


def probability(logprob: float | None) -> float:
    """exp(logprob); 0 where the log-probability was not finite."""
    return 0.0 if logprob is None else math.exp(logprob)


def evidence_text(token: dict[str, Any], rows: int = 5) -> str:
    """The evidence of one token as lines of text."""
    lines = [
        f"{visible(token.get('w', token['t']))}: {probability(token['lp']):.1%} before the "
        f"sampler (rank {token['r'] + 1}), {token['p'] or 0:.1%} after it; "
        f"entropy {token['h'] or 0:.2f} nats"
    ]
    for _, text, logprob, _ in token["a"][:rows]:
        lines.append(f"  {visible(text)}  {probability(logprob):.1%}")
    return "\n".join(lines)


def _token_html(token: dict[str, Any], index: int, *, first: bool, last: bool) -> str:
    text = token["t"].lstrip() if first else token["t"]
    title = escape(evidence_text(token))
    if not text:
        label = escape(visible(token.get("w", token["t"]))[:14]) if last else "·"
        return f'<span class="mark" data-token-index="{index}" title="{title}">{label}</span>'
    surprise = 1 - probability(token["lp"])
    style = f"border-bottom-color:rgba(196,104,0,{surprise:.2f})"
    return (
        f'<span class="tok" data-token-index="{index}" title="{title}" style="{style}">'
        f"{escape(text)}</span>"
    )


def turn_html(turn: dict[str, Any]) -> str:
    """One turn: who, what was said, and how it ended when that was not by itself."""
    who = "You" if turn["role"] == "user" else "Gemma"
    parts, blank = [], True
    tokens = turn["tokens"]
    for index, token in enumerate(tokens):
        parts.append(_token_html(token, index, first=blank, last=index == len(tokens) - 1))
        blank = blank and not token["t"].strip()
    said = "".join(parts) if tokens else escape(turn.get("text", ""))
    out = f'<p class="who">{who}</p><p class="said">{said}</p>'
    if turn.get("finish") not in (None, "stop") and turn.get("detail"):
        out += f'<p class="who">{escape(turn["detail"])}</p>'
    return out


def conversation_html(turns: Sequence[dict[str, Any]], title: str) -> str:
    """The conversation, each reply token with its evidence in its `title`."""
    body = "".join(turn_html(turn) for turn in turns)
    if not body:
        body = '<p class="who">No messages yet when this cell ran.</p>'
    head = escape(title)
    return (
        f'<div class="gnb-record"><style>{_STYLE}</style><b>{head}</b>'
        f'<span class="who"> · hover a token of a reply for its alternatives</span>{body}</div>'
    )


def attended_html(caption: str, rows: Sequence[tuple[int, str, float]]) -> str:
    """A table of attended keys: position, token, weight."""
    cells = "".join(
        f"<tr><td>{position}</td><td>{escape(visible(token))}</td><td>{weight:.4f}</td></tr>"
        for position, token, weight in rows
    )
    table = f"<table><tr><th>key</th><th>token</th><th>weight</th></tr>{cells}</table>"
    return (
        f'<div class="gnb-record"><style>{_STYLE}</style><p class="who">{escape(caption)}</p>'
        f"{table if rows else ''}</div>"
    )
