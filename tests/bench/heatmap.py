"""How soon a heatmap of one head of a conversation of some 2,000 tokens is there.

    python -m tests.bench.heatmap

The session is warm, as in the app, and nothing of the conversation has been looked at before.  From
the call of `chat.trace` to a drawn Figure, and in the attention panel until it shows the layer; the
first heatmap of the process, whose programs are read from the cache of compiled ones (or compiled,
in the first run ever), and after it one head after the other.  The last lines are for comparison:
the plain pass, from nothing.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable

import numpy as np

import gemma_nb as gnb
from gemma_nb.interp.passes import Pass
from gemma_nb.interp.pieces import Selection
from gemma_nb.sites import SITES
from tests.bench.contestants import prompt_of, settle

FIRST, SECOND, REPLY = 1300, 300, 200  # tokens
LAST_LAYER = 17
HEADS = ((17, 2), (0, 1), (0, 3), (5, 0), (5, 2), (11, 1), (17, 3))


def timed(run: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Prints seconds."""
    model, tokenizer = gnb.load("gemma3-270m", progress=False)
    chat = gnb.ChatSession(model, tokenizer, template="none")
    ends = tuple(sorted(chat.template.stop_ids(tokenizer)))
    chat.sampling = gnb.Sampling(seed=0, top_k=64, max_new_tokens=REPLY, forbidden=ends)
    chat.warmup()
    for length in (FIRST, SECOND):
        chat.chat(tokenizer.decode(prompt_of(tokenizer, length)[1:]))
    settle()
    print(f"{len(chat.tokens())} tokens")
    trace = None

    def heatmap(layer: int, head: int) -> None:
        nonlocal trace
        trace = chat.trace(sites=())
        maps = trace.get("attention", layers=layer, heads=head)
        gnb.plots.attention(maps, layer, head).savefig(io.BytesIO(), format="png")

    first = timed(lambda: heatmap(LAST_LAYER, 1))
    print(f"first heatmap, layer {LAST_LAYER}: {first:.2f}")
    took = []
    for layer, head in HEADS:
        took += [timed(lambda layer=layer, head=head: heatmap(layer, head))]  # type: ignore[misc]
        print(f"layer {layer}, head {head}: {took[-1]:.2f}")
    print(f"median of these: {statistics.median(took):.2f}")
    in_panel(chat)
    del trace
    for again in ("", ", once more"):
        plain = Pass(model, np.asarray(chat.tokens(), np.int32))
        one = ([SITES["attention"]], (LAST_LAYER,), Selection(heads=(1,)))
        took_plain = timed(lambda plain=plain, one=one: plain.capture(*one))  # type: ignore[misc]
        print(f"the map alone by a pass from nothing{again}: {took_plain:.2f}")


def in_panel(chat: gnb.ChatSession) -> None:
    """The same in the panel, from its making, and from the choice of another layer."""
    panel = gnb.widgets.AttentionPanel()

    def shown(act: Callable[[], object]) -> float:
        before = panel.head_map

        def until_shown() -> None:
            act()
            while panel.head_map == before and panel.status["phase"] != "error":
                time.sleep(0.001)

        return timed(until_shown)

    print(f"panel: {shown(lambda: panel.attach(chat)):.2f}")
    for layer in (17, 0, 5):
        seconds = shown(lambda layer=layer: setattr(panel, "layer", layer))  # type: ignore[misc]
        print(f"panel, layer {layer}: {seconds:.2f}")
    panel.close()


if __name__ == "__main__":
    main()
