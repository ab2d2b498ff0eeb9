"""The app's controls, found as a screen reader finds them, and what they should say."""

from __future__ import annotations

import json
import math

from playwright.sync_api import Locator, Page, expect

from tests.ui.lab import Notebook


class Chat:
    """The controls of the app, found as a screen reader finds them."""

    def __init__(self, page: Page | Locator) -> None:
        self.log = page.get_by_role("log", name="Conversation")
        self.message = page.get_by_role("textbox", name="Message")
        self.send = page.get_by_role("button", name="Send", exact=True)
        self.stop = page.get_by_role("button", name="Stop", exact=True)
        self.new = page.get_by_role("button", name="New conversation", exact=True)
        self.regenerate = page.get_by_role("button", name="Regenerate")
        self.alternatives = page.get_by_role("region", name="Token alternatives")
        self.rows = self.alternatives.locator("[data-probability]")
        self.context = page.get_by_role("status", name="Context")
        self.attention = page.get_by_role("region", name="Attention")
        self.alert = page.get_by_role("alert")
        self.tokens = self.log.locator("[data-token-index]")

    def type(self, text: str) -> None:
        """Types a message and presses Enter, whether it is taken or not."""
        self.message.fill(text)
        self.message.press("Enter")

    def say(self, text: str) -> None:
        """Sends a message; the box is empty once it was taken, and the reply has begun."""
        self.type(text)
        expect(self.message).to_have_value("")

    def wait_until_done(self) -> None:
        expect(self.regenerate).to_be_enabled(timeout=20_000)
        expect(self.stop).to_be_disabled()


def records(notebook: Notebook) -> list[dict]:
    """chat.turns[-1].tokens, as the kernel has them."""
    code = """
import dataclasses, json
print(json.dumps([dataclasses.asdict(t) for t in chat.turns[-1].tokens]))
"""
    return json.loads(notebook.run_cell(code))


def rows_match(chat: Chat, record: dict) -> None:
    """Asserts that the alternatives shown are those of `record`, number by number."""
    shown = chat.rows.evaluate_all("rows => rows.map(row => ({...row.dataset}))")
    known = {other["token_id"]: other for other in record["alternatives"]}
    assert set(known) <= {int(row["tokenId"]) for row in shown}
    for row in shown:
        other = known.get(int(row["tokenId"]))
        if other is None:  # the chosen token, when it is not among the top ones
            assert int(row["tokenId"]) == record["token_id"]
            other = record
        before, after = float(row["probability"]), float(row["probabilityAfter"])
        assert math.isclose(before, math.exp(other["logprob"]), rel_tol=1e-5)
        assert math.isclose(after, other["probability"], rel_tol=1e-5)
