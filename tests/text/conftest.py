from __future__ import annotations

import pytest
from hypothesis import strategies as st

from gemma_nb.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def real_tokenizer(real_model) -> Tokenizer:
    """The default model's tokenizer; mark the test `real`."""
    return real_model[1]


LOOK_ALIKES = [
    *("<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"),
    *("<unused3>", "<unused6241>", "<start_of_image>", "<end_of_image>", "[multimodal]"),
    *("<0x0A>", "<0xE2>", "<start_of_", "turn>", "<h1>", "</td>", "<s>", "</s>"),
]
ODDITIES = [
    *("\u2581", "\u2581\u2581", " ", "   ", " " * 40, "\n", "\n\n\n", "\n" * 40, "\t\t", "\r\n"),
    *("\0", "\x7f", "\u00a0", "\u3000", "\u200b", "\u2028", "\ufeff", "\ufffd", "\ufffe", "\u2047"),
    *(
        "e\u0301",
        "o\u0308\u0304",
        "\u202e",
        "한국어",
        "日本語",
        "ﷺ",
        "नमस्ते",
        "🇺🇦",
        "👩‍👩‍👧",
        "\U0010ffff",
    ),
    *("The", " the", "don't", "1234", "www.", "  def f():\n    return"),
]

# Any text that Python can encode: all of Unicode but surrogates, and what is easy to get wrong.
texts = st.lists(
    st.one_of(
        st.sampled_from(LOOK_ALIKES + ODDITIES),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.text("aehnot \u2581\n", max_size=8),
    ),
    max_size=12,
).map("".join)
