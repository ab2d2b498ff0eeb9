"""A session that talks and autosaves until it is killed; run by test_autosave.py.

    python -m tests.chat.saving.autosaving FILE TOKENIZER SEED

Goes on with the conversation in FILE, if there is one.  Prints a line for each token that it was
given, and for each turn that ended: the time, the turn's id, and how many tokens it has.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gemma_nb as gnb
from gemma_nb.chat.events import TokenEvent
from gemma_nb.config import TransformerConfig, interleave
from gemma_nb.text.tokenizer import Tokenizer
from tests import tiny


def model_for(tokenizer: Tokenizer) -> gnb.GemmaTransformer:
    """The same small random model in every process."""
    config = TransformerConfig(
        num_embed=tokenizer.vocab_size,
        embed_dim=16,
        hidden_dim=32,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        layers=interleave(2, window=8, pattern=(False, True)),
        query_pre_attn_scalar=16,
        max_context=1024,
    )
    return tiny.random_model(config)


def replies(chat: gnb.ChatSession, draw: random.Random) -> Iterator[TokenEvent]:
    """The next reply, made in one of many ways."""
    chat.sampling = gnb.Sampling(max_new_tokens=draw.choice([1, 20, 300]))
    last = next((turn for turn in reversed(chat.turns) if turn.role == "model"), None)
    way = draw.randrange(8)
    if way == 0 and last is not None and last.tokens:
        return chat.stream_fork(draw.randrange(len(last.tokens)), turn=last)
    if way == 1 and last is not None:
        return chat.stream_regenerate()
    if way == 2 and chat.turns:
        chat.undo()
    if way == 3:
        chat.new_conversation()
    return chat.stream("Hello " * draw.randrange(1, 5))


def main(file: str, tokenizer_file: str, seed: str) -> None:
    """Talks until it is killed."""
    path, draw = Path(file), random.Random(int(seed))
    tokenizer = Tokenizer.from_file(tokenizer_file)
    model = model_for(tokenizer)
    if path.exists():
        chat = gnb.ChatSession.load(path, model, tokenizer, autosave=True)
    else:
        chat = gnb.ChatSession(
            *(model, tokenizer),
            template="none",
            cache_length=1024,
            when_full="drop_oldest",
            autosave=path,
        )
    print("ready", flush=True)
    while True:
        for _ in replies(chat, draw):
            making = chat.making
            if making is not None:
                _, turn = making
                print(time.time(), turn.id, len(turn.tokens), flush=True)
            time.sleep(0.002)  # as fast as a real model; a kill hits every kind of moment
        turn = chat.turns[-1]
        print(time.time(), turn.id, len(turn.tokens), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
