from __future__ import annotations

from html.parser import HTMLParser

from gemma_nb.widgets.html import attended_html, conversation_html
from gemma_nb.widgets.transcript import encode_head, encode_token
from tests.widgets.fakes import FakeSession

EVIL = (
    " </script><script>alert(1)</script>",
    " <img src=x onerror=alert(2)>",
    " \"quoted' &amp;",
    "\n",
)


class Reader(HTMLParser):
    """The tags of a document, and the text outside styles."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.styled = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        self.styled = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self.styled = self.styled and tag != "style"

    def handle_data(self, data: str) -> None:
        if not self.styled:
            self.text += data


def encoded(session: FakeSession) -> list[dict]:
    return [
        {**encode_head(turn), "tokens": [encode_token(token) for token in turn.tokens]}
        for turn in session.turns
    ]


def test_model_text_cannot_break_out_of_the_record() -> None:
    session = FakeSession(replies=[EVIL])
    session.chat("</script><b>hi</b>")
    html = conversation_html(encoded(session), "<i>title</i>")
    read = Reader(html)
    assert {tag for tag, _ in read.tags} == {"div", "style", "b", "span", "p"}
    assert html.count("<b>") == 1, "only our own"
    assert "script" not in html.replace("/script", "").replace("script&gt;", "")
    assert not any(name.startswith("on") for _, attrs in read.tags for name in attrs)
    assert "".join(EVIL).strip() in read.text
    assert "</script><b>hi</b>" in read.text


def test_each_token_has_its_evidence() -> None:
    session = FakeSession()
    turn = session.chat("What is the capital of France?")
    read = Reader(conversation_html(encoded(session), "Gemma"))
    spans = [attrs for _, attrs in read.tags if "data-token-index" in attrs]
    assert [int(span["data-token-index"]) for span in spans] == list(range(len(turn.tokens)))
    assert "rank 1" in spans[0]["title"] or f"rank {turn.tokens[0].rank + 1}" in spans[0]["title"]
    assert len(spans[0]["title"].splitlines()) == 6
    assert "The capital of France is Paris." in read.text
    assert "You" in read.text
    assert "<end_of_turn>" in read.text


def test_how_a_reply_ended_is_said_unless_it_ended_by_itself() -> None:
    session = FakeSession()
    session.sampling = type(session.sampling)(max_new_tokens=2)
    session.chat("hi")
    assert "limit of new tokens" in conversation_html(encoded(session), "Gemma")


def test_an_empty_conversation_says_so() -> None:
    assert "No messages yet" in conversation_html([], "Gemma")


def test_attended_keys_are_a_table() -> None:
    html = attended_html("<b>", [(3, "</td>", 0.25)])
    assert "&lt;b&gt;" in html
    assert "<td>&lt;/td&gt;</td>" in html
    assert "0.2500" in html
