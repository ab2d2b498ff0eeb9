"""Names of tensors in Hugging Face checkpoints, as programs have wrapped them.

Every parameter is known by the end of its name (`layers.0.mlp.down_proj.weight`), so that any
prefix is as good as `model.`, and none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from gemma_nb.checkpoints import layout
from gemma_nb.config import TransformerConfig

HEAD = "lm_head.weight"

# What stands beside the text model in a Gemma3ForConditionalGeneration.
_NOT_TEXT = re.compile(r"(?:^|\.)(?:vision_tower|vision_model|multi_modal_projector)\.")
_BUFFERS = re.compile(r"\.(?:inv_freq|position_ids|masked_bias)$")  # computed, not learned
# Parts that a wrapper has put in front or between: `_orig_mod` of torch.compile,
# `_fsdp_wrapped_module`, `_checkpoint_wrapped_module`, `module` of data-parallel training.  No part
# of the model's own names begins with an underscore.
_WRAPPED = re.compile(r"(?:^|(?<=\.))(?:_\w+|module)\.")


def text_names(stored: Iterable[str], config: TransformerConfig) -> Iterator[tuple[str, str]]:
    """(stored name, name in a text-only checkpoint) of everything that belongs to no images.

    What is no parameter of `config` keeps the name it has.
    """
    ends = {name.removeprefix("model."): name for leaf in layout.leaves(config) for name in leaf.hf}
    ends[HEAD] = HEAD
    for name in stored:
        if _NOT_TEXT.search(name) or _BUFFERS.search(name):
            continue
        parts = _WRAPPED.sub("", name).split(".")
        possible = (".".join(parts[i:]) for i in range(len(parts)))
        yield name, next((ends[end] for end in possible if end in ends), name)
