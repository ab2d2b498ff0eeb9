"""Cost of saving a conversation of 1,000 turns: `python -m tests.bench.saving`.

Processor time, of all threads; the disk is left out.  The conversation is made up: 500 messages,
and replies of 100 tokens with ten alternatives each, of random numbers, which is what evidence
looks like to a file.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import gemma_nb as gnb
from gemma_nb.chat.records import Alternative, TokenRecord
from gemma_nb.chat.saving import journal
from gemma_nb.chat.saving.autosave import Autosave
from gemma_nb.chat.tree import ConversationTree
from gemma_nb.chat.turns import Turn

TURNS, TOKENS, ALTERNATIVES = 1000, 100, 10
_VOCABULARY = 30_000  # token texts in use


def random_turn(draw: random.Random, id_: int) -> Turn:
    """A message, or a reply with its evidence."""
    if id_ % 2:
        return Turn(id_, "user", "What is the capital of France, and why?")

    def number() -> float:
        return float(np.float32(draw.gauss(-3, 2)))

    def alternative() -> Alternative:
        token = draw.randrange(_VOCABULARY)
        return Alternative(token, f" word{token}", number(), number())

    def record(index: int) -> TokenRecord:
        best = tuple(alternative() for _ in range(ALTERNATIVES))
        chosen, piece = best[0].token_id, best[0].text
        numbers = (number(), number(), number(), 0)
        return TokenRecord(index, chosen, piece, piece, 100 + index, *numbers, best, key=(7, index))

    tokens = tuple(record(index) for index in range(TOKENS))
    text = "".join(token.text for token in tokens)
    return Turn(id_, "model", text, tokens, tuple(token.token_id for token in tokens), "stop")


def main() -> None:
    """Prints the figures."""
    model, tokenizer = gnb.load("gemma3-270m", progress=False)
    chat = gnb.ChatSession(model, tokenizer)
    Autosave._run = lambda self: None  # type: ignore[method-assign]  # looks when it is told to
    draw = random.Random(0)
    turns = [random_turn(draw, id_) for id_ in range(1, TURNS + 1)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "talk.gnb"
        start = time.process_time()
        chat.autosave = path
        print(f"first file             {time.process_time() - start:.3f} s")
        autosave = chat.keeper._autosave
        assert autosave is not None
        tree = ConversationTree()
        chat.adopt(tree)
        node, took, written = tree.root, [], 0
        for turn in turns:
            node = tree.add(node, turn)
            if turn.role == "model":
                before = journal.path_of(path).stat().st_size
                start = time.process_time()
                autosave.flush()
                took.append(time.process_time() - start)
                after = journal.path_of(path).stat().st_size
                written += after - before if after > before else path.stat().st_size
        start = time.process_time()
        chat.autosave = None
        print(f"closing                {time.process_time() - start:.3f} s")
        size = path.stat().st_size
        print(f"file                   {size / 1e6:.1f} MB")
        print(f"written while talking  {written / size:.1f} times the file")
        for name, part in (("turns 2 to 200", took[:100]), ("turns 802 to 1000", took[-100:])):
            median, longest = statistics.median(part), max(part)
            print(f"{name:22} {1e3 * median:.1f} ms a turn, at most {1e3 * longest:.0f} ms")
        start = time.process_time()
        chat.save(path)
        print(f"save                   {time.process_time() - start:.2f} s")
        start = time.process_time()
        loaded = gnb.ChatSession.load(path, model, tokenizer)
        print(f"load                   {time.process_time() - start:.2f} s")
        assert loaded.turns == tuple(turns)


if __name__ == "__main__":
    main()
