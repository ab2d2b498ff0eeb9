"""One frozen configuration per released size, and what is known about each release.

Sources: the technical reports of Gemma (arXiv:2403.08295, table 1), Gemma 2 (arXiv:2408.00118,
table 1) and Gemma 3 (arXiv:2503.19786, table 1), and the configurations of google-deepmind/gemma
(`gm/nn/_gemma.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Literal

from gemma_nb.config import Global, LayerSpec, TransformerConfig, interleave

Tuning = Literal["base", "instruction"]
Fields = tuple[tuple[str, float | int], ...]

# Recommended for instruction-tuned Gemma 3 by its authors: temperature 1, top-k 64, top-p 0.95.
# Nothing was published for Gemma 1 and 2, which do well with the same.
GEMMA3_SAMPLING: Mapping[str, float | int] = MappingProxyType(
    {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
)
# A base model wanders at the temperature recommended for instruction-tuned ones.
BASE_SAMPLING: Mapping[str, float | int] = MappingProxyType(
    {"temperature": 0.4, "top_k": 40, "top_p": 0.95}
)

GEMMA_TERMS = "Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms"
HEALTH_TERMS = (
    "This model is provided under and subject to the Health AI Developer Foundations Terms of Use: "
    "https://developers.google.com/health-ai-developer-foundations/terms"
)


@dataclasses.dataclass(frozen=True)
class ChatTemplates:
    """What a checkpoint's own files say about how a conversation is written.

    Attributes:
      sources: (name, Jinja text) pairs; where there is one only, it is "default".
      tokens: (name, text) pairs of the special tokens that it may use, such as
        ("eos_token", "<|im_end|>").
      add_bos: whether `<bos>` leads every text.
    """

    sources: tuple[tuple[str, str], ...] = ()
    tokens: tuple[tuple[str, str], ...] = ()
    add_bos: bool = True


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What is known about a checkpoint beside its numbers.

    Attributes:
      name: as in `gnb.load(name)`.
      title: for people.
      tuning: "base" (pretrained only) or "instruction".
      sampling: recommended fields of `gnb.Sampling`, as (name, value) pairs.
      source: where these weights came from.
      terms: licence or terms of use.
      preset: the size, a name for `by_name`; "" for a model of no released size.
      tokenizer_version: 2 for the vocabulary of Gemma 1 and 2, 3 for that of Gemma 3.
      template: how a conversation is written for it, a name for `gnb.ChatSession(template=...)`.
      hugging_face: its repository on Hugging Face, "" where there is none.
      kaggle: the handle of its Flax checkpoint on Kaggle, "" where there is none.
      chat_templates: of a checkpoint that is no release: those of its files, where it has any.
    """

    name: str
    title: str
    tuning: Tuning = "base"
    sampling: Fields = tuple(GEMMA3_SAMPLING.items())
    source: str = ""
    terms: str = ""
    preset: str = ""
    tokenizer_version: int | None = None
    template: str = "auto"
    hugging_face: str = ""
    kaggle: str = ""
    chat_templates: ChatTemplates | None = dataclasses.field(default=None, repr=False)


# 256,128 rows as in the official Flax checkpoints; other formats leave out the last 128, unused.
_OLD_VOCABULARY, _VOCABULARY = 256_128, 262_144


def _gemma1(
    num_layers: int, embed_dim: int, hidden_dim: int, heads: tuple[int, int]
) -> TransformerConfig:
    return TransformerConfig(
        num_embed=_OLD_VOCABULARY,
        embed_dim=embed_dim,
        hidden_dim=hidden_dim,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=256,
        layers=(LayerSpec(Global()),) * num_layers,
        query_pre_attn_scalar=256,
        use_qk_norm=False,
        use_post_attn_norm=False,
        use_post_ffw_norm=False,
        transpose_gating_einsum=False,
        max_context=8192,
    )


def _gemma2(
    num_layers: int,
    embed_dim: int,
    hidden_dim: int,
    heads: tuple[int, int],
    *,
    head_dim: int = 256,
    query_pre_attn_scalar: float | None = None,
    transpose_gating_einsum: bool = True,
) -> TransformerConfig:
    return TransformerConfig(
        num_embed=_OLD_VOCABULARY,
        embed_dim=embed_dim,
        hidden_dim=hidden_dim,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        layers=interleave(num_layers, window=4096, pattern=(False, True), global_base=10_000.0),
        query_pre_attn_scalar=query_pre_attn_scalar or head_dim,
        use_qk_norm=False,
        attn_logits_soft_cap=50.0,
        final_logit_soft_cap=30.0,
        transpose_gating_einsum=transpose_gating_einsum,
        max_context=8192,
    )


def _gemma3(
    num_layers: int,
    embed_dim: int,
    hidden_dim: int,
    heads: tuple[int, int],
    *,
    head_dim: int = 256,
    window: int = 1024,
    global_scale: float = 8.0,
    query_pre_attn_scalar: float | None = None,
    max_context: int = 131_072,
) -> TransformerConfig:
    return TransformerConfig(
        num_embed=_VOCABULARY,
        embed_dim=embed_dim,
        hidden_dim=hidden_dim,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        layers=interleave(num_layers, window=window, global_scale=global_scale),
        query_pre_attn_scalar=query_pre_attn_scalar or head_dim,
        max_context=max_context,
    )


GEMMA1_2B = _gemma1(18, 2048, 16_384, (8, 1))
GEMMA1_7B = _gemma1(28, 3072, 24_576, (16, 16))

GEMMA2_2B = _gemma2(26, 2304, 9216, (8, 4), transpose_gating_einsum=False)
GEMMA2_9B = _gemma2(42, 3584, 14_336, (16, 8))
# Both 27Bs scale queries by embed_dim / num_heads instead of head_dim.
GEMMA2_27B = _gemma2(46, 4608, 36_864, (32, 16), head_dim=128, query_pre_attn_scalar=4608 / 32)

GEMMA3_270M = _gemma3(18, 640, 2048, (4, 1), window=512, global_scale=1.0, max_context=32_768)
GEMMA3_1B = _gemma3(26, 1152, 6912, (4, 1), window=512, global_scale=1.0, max_context=32_768)
GEMMA3_4B = _gemma3(34, 2560, 10_240, (8, 4))
GEMMA3_12B = _gemma3(48, 3840, 15_360, (16, 8))
GEMMA3_27B = _gemma3(62, 5376, 21_504, (32, 16), head_dim=128, query_pre_attn_scalar=5376 / 32)

PRESETS: Mapping[str, TransformerConfig] = MappingProxyType(
    {
        "gemma1-2b": GEMMA1_2B,
        "gemma1-7b": GEMMA1_7B,
        "gemma2-2b": GEMMA2_2B,
        "gemma2-9b": GEMMA2_9B,
        "gemma2-27b": GEMMA2_27B,
        "gemma3-270m": GEMMA3_270M,
        "gemma3-1b": GEMMA3_1B,
        "gemma3-4b": GEMMA3_4B,
        "gemma3-12b": GEMMA3_12B,
        "gemma3-27b": GEMMA3_27B,
    }
)


def by_name(name: str) -> TransformerConfig:
    """The configuration of a released size.

    Raises:
      ValueError: an unknown name; the message lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def name_of(config: TransformerConfig) -> str | None:
    """The released size that computes what `config` does, whatever file it was read from.

    Files differ in how many unused rows they give the vocabulary, in which way round they store
    the gating matrices, and in the context that they announce; none of these makes another size.
    """

    def essence(c: TransformerConfig) -> TransformerConfig:
        return dataclasses.replace(c, num_embed=1, transpose_gating_einsum=True, max_context=1)

    for name, preset in PRESETS.items():
        near = abs(config.num_embed - preset.num_embed) <= 128
        if near and essence(config) == essence(preset):
            return name
    return None


def tokenizer_version(config: TransformerConfig) -> int | None:
    """2 for the vocabulary of Gemma 1 and 2, 3 for that of Gemma 3, None for any other."""
    name = name_of(config)
    return None if name is None else _tokenizer_version(name)


def _tokenizer_version(preset: str) -> int:
    return 3 if preset.startswith("gemma3") else 2


def _release(
    name: str,
    preset: str,
    title: str,
    hugging_face: str,
    *,
    kaggle: str = "",
    tuning: Tuning = "instruction",
    terms: str = GEMMA_TERMS,
    template: str = "",
) -> ModelInfo:
    base = tuning == "base"
    return ModelInfo(
        name=name,
        title=title,
        tuning=tuning,
        sampling=tuple((BASE_SAMPLING if base else GEMMA3_SAMPLING).items()),
        terms=terms,
        preset=preset,
        tokenizer_version=_tokenizer_version(preset),
        template=template or ("transcript" if base else "gemma"),
        hugging_face=f"google/{hugging_face}",
        kaggle=kaggle and f"google/{kaggle}",
    )


def _sizes() -> Iterator[ModelInfo]:
    """Every size, pretrained and instruction-tuned."""
    for preset in PRESETS:
        family, size = preset.removeprefix("gemma").split("-")
        title = f"Gemma {family} {size.upper()}"
        # Gemma 1 was simply "gemma"; Gemma 3 names its pretrained checkpoints, except the smallest.
        stem = f"gemma-{size}" if family == "1" else f"gemma-{family}-{size}"
        pretrained = f"{stem}-pt" if family == "3" and size != "270m" else stem
        # The smallest Gemma 3 came later, and is spelled as on Hugging Face.
        flax_name = {"1": size, "3": stem if size == "270m" else preset}.get(family, preset)
        flax = f"gemma/flax/{size}" if family == "1" else f"gemma-{family}/flax/{flax_name}"
        yield _release(preset, preset, title, pretrained, kaggle=flax, tuning="base")
        yield _release(
            f"{preset}-it", preset, f"{title} instruction-tuned", f"{stem}-it", kaggle=f"{flax}-it"
        )


# Releases that are a size above with other weights: what each is called, here and on Hugging Face
# (without "google/"), its size, and its title.
_DERIVATIVES = """
gemma1.1-2b-it        gemma-1.1-2b-it       gemma1-2b    Gemma 1.1 2B instruction-tuned
gemma1.1-7b-it        gemma-1.1-7b-it       gemma1-7b    Gemma 1.1 7B instruction-tuned
codegemma-2b          codegemma-2b          gemma1-2b    CodeGemma 2B
codegemma-7b          codegemma-7b          gemma1-7b    CodeGemma 7B
codegemma-7b-it       codegemma-7b-it       gemma1-7b    CodeGemma 7B instruction-tuned
codegemma-1.1-2b      codegemma-1.1-2b      gemma1-2b    CodeGemma 1.1 2B
codegemma-1.1-7b-it   codegemma-1.1-7b-it   gemma1-7b    CodeGemma 1.1 7B instruction-tuned
gemma2-2b-jpn-it      gemma-2-2b-jpn-it     gemma2-2b    Gemma 2 2B Japanese instruction-tuned
shieldgemma-2b        shieldgemma-2b        gemma2-2b    ShieldGemma 2B
shieldgemma-9b        shieldgemma-9b        gemma2-9b    ShieldGemma 9B
shieldgemma-27b       shieldgemma-27b       gemma2-27b   ShieldGemma 27B
txgemma-2b-predict    txgemma-2b-predict    gemma2-2b    TxGemma 2B Predict
txgemma-9b-predict    txgemma-9b-predict    gemma2-9b    TxGemma 9B Predict
txgemma-27b-predict   txgemma-27b-predict   gemma2-27b   TxGemma 27B Predict
txgemma-9b-chat       txgemma-9b-chat       gemma2-9b    TxGemma 9B Chat
txgemma-27b-chat      txgemma-27b-chat      gemma2-27b   TxGemma 27B Chat
functiongemma-270m-it functiongemma-270m-it gemma3-270m  FunctionGemma 270M instruction-tuned
shieldgemma2-4b-it    shieldgemma-2-4b-it   gemma3-4b    ShieldGemma 2 4B
medgemma-4b           medgemma-4b-pt        gemma3-4b    MedGemma 4B
medgemma-4b-it        medgemma-4b-it        gemma3-4b    MedGemma 4B instruction-tuned
medgemma-27b-it       medgemma-27b-it       gemma3-27b   MedGemma 27B instruction-tuned
medgemma-27b-text-it  medgemma-27b-text-it  gemma3-27b   MedGemma 27B text instruction-tuned
"""
_PRETRAINED = {"codegemma-2b", "codegemma-7b", "codegemma-1.1-2b", "medgemma-4b"}


def _derivatives() -> Iterator[ModelInfo]:
    for line in _DERIVATIVES.strip().splitlines():
        name, hugging_face, preset, title = line.split(maxsplit=3)
        # What completes code, or answers one prompt of its own form, does not take turns.
        bare = name.endswith("-predict") or (name in _PRETRAINED and name.startswith("code"))
        yield _release(
            name,
            preset,
            title,
            hugging_face,
            tuning="base" if name in _PRETRAINED else "instruction",
            terms=HEALTH_TERMS if name.startswith(("medgemma", "txgemma")) else GEMMA_TERMS,
            template="none" if bare else "",
        )


RELEASES: Mapping[str, ModelInfo] = MappingProxyType(
    {info.name: info for info in (*_sizes(), *_derivatives())}
)
