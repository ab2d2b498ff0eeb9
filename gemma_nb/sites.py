"""Where a forward pass can be observed: capture-site names, their axes, and what they hold.

Every site that a module computes is sown into the linen collection `intermediates` on each forward
pass.  That is free unless the caller makes the collection mutable.  A few sites are derived from
others where they are asked for, since the forward pass itself never has them as arrays.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from gemma_nb.indices import Index, Indices, ascending, one

if TYPE_CHECKING:
    from gemma_nb.config import TransformerConfig
    from gemma_nb.model import GemmaTransformer

# The layer index of sites that the model has once.
EVERYWHERE = -1
_LAYERS = "the model has layers"


@dataclasses.dataclass(frozen=True)
class Site:
    """One place in the forward pass.

    Attributes:
      name: what to ask for.
      dims: axes of one layer's value, in the letters of `gemma_nb.typing`.
      holds: what the value is.
      per_layer: whether every layer has one; otherwise the model has it once.
      home: the modules below the layer (or the model) that sow it; None where it is derived.
      sown: the name that it is sown under.
      only_with: the switch of `TransformerConfig` that a model must have on; None for all models.
    """

    name: str
    dims: tuple[str, ...]
    holds: str
    per_layer: bool = True
    home: tuple[str, ...] | None = ()
    sown: str = ""
    only_with: str | None = None

    @property
    def alias(self) -> str:
        """The other word of the field that it can be asked for by; "" for none."""
        return next((other for other, name in ALIASES.items() if name == self.name), "")

    @property
    def is_map(self) -> bool:
        """Whether it has both query and key positions."""
        return "S" in self.dims

    def value(self, sown: Mapping[str, Any], layer: int | None = None) -> Any:
        """Its array in `intermediates`: of a block, or with `layer` of the whole model."""
        place: Any = sown if layer is None else sown[f"layer_{layer}"]
        for name in self.home or ():
            place = place[name]
        return place[self.sown or self.name][0]


_BTD = ("B", "T", "D")
_BTNH = ("B", "T", "N", "H")
_BTKH = ("B", "T", "K", "H")
_BTF = ("B", "T", "F")


def _rms(name: str, of: str, home: tuple[str, ...], *axes: str, **options: Any) -> Site:
    holds = f"what the norm divides {of} by: sqrt(mean square + epsilon)"
    return Site(f"{name}_rms", ("B", "T", *axes), holds, home=home, sown="rms", **options)


# In the order of the computation.
_ALL = (
    Site("embed", _BTD, "token embeddings times sqrt(D), the first residual", per_layer=False),
    Site("residual_pre", _BTD, "the residual stream before the layer"),
    _rms("pre_attention", "attention's input", ("pre_attention_norm",)),
    Site("attn_in", _BTD, "what attention reads: the normalised residual stream"),
    _rms("query", "each query", ("attn", "_query_norm"), "N", only_with="use_qk_norm"),
    _rms("key", "each key", ("attn", "_key_norm"), "K", only_with="use_qk_norm"),
    Site(
        "q_pre", _BTNH, "queries before rotation, normalised where the model does", home=("attn",)
    ),
    Site(
        "k_pre", _BTKH, "new keys before rotation, normalised where the model does", home=("attn",)
    ),
    Site("q", _BTNH, "queries, normalised, rotated and scaled", home=("attn",)),
    Site("k", _BTKH, "new keys, normalised and rotated", home=("attn",)),
    Site("v", _BTKH, "new values", home=("attn",)),
    Site(
        "scores",
        ("B", "T", "N", "S"),
        "attention scores, soft-capped where the model does, -inf where a key is never seen",
        home=None,
    ),
    Site("attention", ("B", "T", "N", "S"), "attention weights after the softmax", home=("attn",)),
    Site("z", _BTNH, "attention-weighted values, per head", home=("attn",)),
    Site(
        "head_out",
        ("B", "T", "N", "D"),
        "what each head adds to attn_raw, before any post-norm",
        home=None,
    ),
    Site("attn_raw", _BTD, "attention's output before any post-norm", home=("attn",)),
    _rms(
        "post_attention",
        "attention's output",
        ("post_attention_norm",),
        only_with="use_post_attn_norm",
    ),
    Site("attn_out", _BTD, "what attention adds to the residual stream"),
    Site("residual_mid", _BTD, "the residual stream after attention"),
    _rms("pre_ffw", "the feed-forward's input", ("pre_ffw_norm",)),
    Site("mlp_in", _BTD, "what the feed-forward reads: the normalised residual stream"),
    Site("mlp_gate", _BTF, "the gate before its gelu", home=("mlp",)),
    Site("mlp_up", _BTF, "what the gate multiplies", home=("mlp",)),
    Site("mlp_hidden", _BTF, "feed-forward activations, gelu(gate) * up", home=("mlp",)),
    Site("mlp_raw", _BTD, "the feed-forward's output before any post-norm", home=("mlp",)),
    _rms(
        "post_ffw", "the feed-forward's output", ("post_ffw_norm",), only_with="use_post_ffw_norm"
    ),
    Site("mlp_out", _BTD, "what the feed-forward adds to the residual stream"),
    Site("residual", _BTD, "the residual stream after the layer"),
    _rms("final", "the last residual", ("final_norm",), per_layer=False),
    Site("final", _BTD, "the last residual after the final norm", per_layer=False),
    Site(
        "logits",
        ("B", "T", "V"),
        "logits of the next token, soft-capped where the model does",
        per_layer=False,
        home=None,
    ),
)
SITES: dict[str, Site] = {site.name: site for site in _ALL}

# The field's other words, as good wherever a site is named; results carry the names above.
ALIASES = {
    "resid_pre": "residual_pre",
    "resid_mid": "residual_mid",
    "resid_post": "residual",
    "pattern": "attention",
}


def canonical(name: str) -> str:
    """The name of the site that `name` means, which may be an alias; any other text as it is."""
    return ALIASES.get(name, name)


def spelled(names: Iterable[str]) -> str:
    """Names of sites for an error, each with its alias."""
    others = {name: f"{name} ({other})" for other, name in ALIASES.items()}
    return ", ".join(others.get(name, name) for name in names)


def site(name: str) -> Site:
    """The site called `name`, or that it is an alias of.

    Raises:
      ValueError: no such site; the message lists the known ones.
    """
    if not isinstance(name, str):
        raise ValueError(f'a capture site is a name, such as "residual", got {name!r:.60}')
    if canonical(name) not in SITES:
        meant = _meant(name)
        raise ValueError(f"unknown capture site {name!r}{meant}; the sites are {spelled(SITES)}")
    return SITES[canonical(name)]


# What TransformerLens calls them, behind "blocks.5." and without "hook_".
_HOOKS = {
    **ALIASES,
    "attn_scores": "scores",
    "rot_q": "q",
    "rot_k": "k",
    "q": "q_pre",
    "k": "k_pre",
    "result": "head_out",
    "pre": "mlp_gate",
    "pre_linear": "mlp_up",
    "post": "mlp_hidden",
    "ln_final.normalized": "final",
    "ln1.normalized": "attn_in",
    "ln2.normalized": "mlp_in",
}


def _meant(name: str) -> str:
    """What is meant by a name of TransformerLens; "" where it is none."""
    hook = re.fullmatch(r"(?:blocks\.(\d+)\.)?((?:\w+\.)?)(?:hook_)?(\w+)", name)
    if hook is None:
        return ""
    layer, module, short = hook.groups()
    found = _HOOKS.get(module + short) or _HOOKS.get(short, short)
    if found not in SITES:
        return ""
    where = "" if layer is None else f", layers={layer}"
    return f", which is {found!r} here: trace.get({found!r}{where})"


def site_of(model: GemmaTransformer | TransformerConfig, name: str) -> Site:
    """The site called `name`, or that it is an alias of, which `model` has.

    Raises:
      ValueError: no such site, or not in this model; the message lists those that there are.
    """
    found, known = site(name), [s.name for s in list_sites(model)]
    if found.name in known:
        return found
    if _shown(model) is not None:
        raise ValueError(
            f"a wrapped transformer does not show the site {name!r}; it shows {spelled(known)}.  "
            "To see all sites, compute with gnb.nn.Transformer on the same parameters"
        )
    raise ValueError(
        f"this model has no site {name!r} ({found.only_with} is off); its sites are "
        f"{spelled(known)}"
    )


def check_layers(layers: Indices, num_layers: int) -> tuple[int, ...]:
    """`layers` as ascending indices into a model of `num_layers`, each once; None means all.

    Negative indices count from the last layer; see `gemma_nb.indices` for what else is an index.

    Raises:
      ValueError: no index, or one out of range; the message gives the range.
    """
    return ascending(layers, num_layers, "layer", owner=_LAYERS)


def check_layer(layer: Index, num_layers: int) -> int:
    """`layer` as the index of one layer.

    Raises:
      ValueError: as of `check_layers`, or several layers.
    """
    return one(layer, num_layers, "layer", owner=_LAYERS)


def check_heads(heads: Indices, num_heads: int) -> tuple[int, ...]:
    """`heads` as ascending indices of query heads, each once; None means all.

    Raises:
      ValueError: no index, or one out of range; the message gives the range.
    """
    return ascending(heads, num_heads, "head", owner="each layer has heads")


def list_sites(model: GemmaTransformer | TransformerConfig) -> list[Site]:
    """Every capture site that `model` has, in the order of the computation.

    Each goes by its `name`, and where the field has another word, by its `alias`, too.

    Models without query-key norms or post-norms lack the sites of these; a transformer of another
    library (`GemmaTransformer.wrap`) shows what can be read from outside.
    """
    config, shown = getattr(model, "config", model), _shown(model)
    return [
        s
        for s in _ALL
        if (s.only_with is None or getattr(config, s.only_with))
        and (shown is None or s.name in shown)
    ]


def _shown(model: Any) -> tuple[str, ...] | None:
    """The names that a wrapped transformer is restricted to; None for our own."""
    return getattr(getattr(model, "transformer", None), "shown_sites", None)
