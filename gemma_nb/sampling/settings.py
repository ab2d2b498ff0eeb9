"""Settings of a reply: how its tokens are chosen, and what is kept of each choice."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from gemma_nb import settings
from gemma_nb.indices import is_mask, listed
from gemma_nb.sites import check_layers
from gemma_nb.summaries import summary

if TYPE_CHECKING:
    from gemma_nb.model import GemmaTransformer

# What settings are held to, so that no product or quotient of them and a logit leaves float32
# (1.2e-38 to 3.4e38): beyond it every score is infinite or NaN, and nothing is left to draw.
_SMALLEST, _LARGEST, _PENALTY = 1e-24, 1e24, 1e6


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of sampling.  `None` switches a method off, and is the default of what is needed.

    The methods apply in this order, as in Hugging Face transformers: repetition penalty,
    forbidden tokens, temperature, top-k, top-p, min-p.

    Attributes:
      temperature: logits are divided by it; 0 always takes the most likely token (greedy).
      top_k: keep the k most likely tokens.
      top_p: keep the fewest tokens whose probability adds up to at least this
        (nucleus sampling, arXiv:1904.09751).
      min_p: keep tokens at least this many times as likely as the most likely one
        (arXiv:2407.01082).
      repetition_penalty: logits of tokens already in the context are divided by it where positive,
        multiplied where negative (CTRL, arXiv:1909.05858, section 4.1).  1 changes nothing.
      seed: the same seed in the same conversation gives the same reply; None draws one, which the
        turn then records.
      max_new_tokens: longest reply.
      stop: the reply ends before the first of these strings.
      forbidden: token ids that are never chosen.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    forbidden: tuple[int, ...] = ()

    __repr__ = summary

    def __post_init__(self) -> None:
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)

    def _checked(self) -> dict[str, Any]:
        """The fields as plain Python values.

        Raises:
          ValueError: a value that its field cannot have, by the name of the field.
        """
        return {
            "temperature": _within(
                *("temperature", self.temperature, 0),
                expected=f"0 (greedy) or a number from {_SMALLEST:g} to {_LARGEST:g}",
                default=Sampling.temperature,
            ),
            "top_k": _counted("top_k", self.top_k, "at least 1, or None for no limit"),
            "top_p": _within("top_p", self.top_p, most=1),
            "min_p": _within("min_p", self.min_p, 0, most=1),
            "repetition_penalty": _within(
                *("repetition_penalty", self.repetition_penalty),
                least=1 / _PENALTY,
                most=_PENALTY,
            ),
            "seed": _counted("seed", self.seed, "in 0 to 2**32 - 1, or None", 0, 2**32 - 1),
            "max_new_tokens": _counted(
                "max_new_tokens",
                Sampling.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens,
                "at least 1",
            ),
            "stop": settings.texts("stop", self.stop, "a non-empty string, or a list of such"),
            "forbidden": settings.wholes("forbidden", self.forbidden, "a list of token ids"),
        }

    @classmethod
    def given(cls, sampling: Sampling | Mapping[str, Any] | None) -> Sampling | None:
        """Settings as an argument gives them: whole, as a mapping of the fields, or None.

        Raises:
          ValueError: it is none of these, or a field is unknown or has another value.
        """
        return None if sampling is None else settings.record(cls, "sampling", sampling)

    @classmethod
    def recommended(cls, model: GemmaTransformer, **changes: object) -> Sampling:
        """The recommendation of the authors of `model`'s checkpoint, with `changes` on top."""
        fields = dict(model.info.sampling) if model.info else {}
        return cls(**{**fields, **changes})  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Capture:
    """Settings of what is stored with every reply token.

    Attributes:
      top_k: how many alternatives.
      attention_layers: layers whose attention weights are kept: "all", indices (negative ones count
        from the last layer), a slice or mask of the layers, or None.  They come out of the step
        that chooses the token, in float16; see `TokenRecord.attention`.  By default none are, since
        they take memory: for Gemma 3 270M up to 61 kB a token in the local layers, and another 24
        bytes for each token of the context in the global ones; what nobody looks at may as well be
        computed when it is looked at (`chat.look`).
      attention_bytes: most bytes that the attention rows of a session may take.  When they are
        used up, the oldest rows are evicted; `chat.attention_kept` says how many.
    """

    top_k: int = 10
    attention_layers: Literal["all"] | Sequence[int] | None = None
    attention_bytes: int = 256_000_000

    def __post_init__(self) -> None:
        top_k = Capture.top_k if self.top_k is None else self.top_k
        top_k = settings.whole("Capture.top_k", top_k, "a whole number from 1 to 256")
        if not 1 <= top_k <= 256:
            settings.refuse("Capture.top_k", "a whole number from 1 to 256", self.top_k)
        most = Capture.attention_bytes if self.attention_bytes is None else self.attention_bytes
        most = settings.whole("Capture.attention_bytes", most, "a number of bytes")
        if most < 0:
            settings.refuse("Capture.attention_bytes", "at least 0", self.attention_bytes)
        layers = self.attention_layers
        if isinstance(layers, str) and layers != "all":
            settings.refuse(
                "Capture.attention_layers", '"all", a list of layer indices, or None', layers
            )
        if layers is not None and not isinstance(layers, str | slice):
            layers = tuple(listed(layers, "Capture.attention_layers"))
        fields = {"top_k": top_k, "attention_bytes": most, "attention_layers": layers}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def resolved(self, num_layers: int) -> Capture:
        """The same for a model of so many layers, a mask or a slice of them as indices.

        Raises:
          ValueError: a mask of another length.
        """
        layers: Any = self.attention_layers
        if isinstance(layers, slice) or (isinstance(layers, tuple) and is_mask(layers)):
            return dataclasses.replace(self, attention_layers=check_layers(layers, num_layers))
        return self

    def fitting(self, num_layers: int) -> Capture:
        """The same for a model of so many layers, without those that it does not have."""
        if self.attention_layers is None or self.attention_layers == "all":
            return self
        layers = tuple(i for i in self.attention_layers if -num_layers <= i < num_layers)
        return dataclasses.replace(self, attention_layers=layers or None)


def _within(
    name: str,
    value: Any,
    *also: float,
    least: float = _SMALLEST,
    most: float = _LARGEST,
    expected: str = "",
    default: float | None = None,
) -> float | None:
    """A number from `least` to `most`, or one of `also`; None for None, or the `default`."""
    if value is None:
        return default
    alone = "".join(f"{number:g}, " for number in also)
    expected = expected or f"{alone}a number from {least:g} to {most:g}, or None"
    number = settings.real(name, value, expected)
    if number not in also and not least <= number <= most:
        settings.refuse(name, expected, value)
    return number


def _counted(
    name: str, value: Any, expected: str, least: int = 1, most: float = math.inf
) -> int | None:
    """A whole number from `least` to `most`; None for None."""
    if value is None:
        return None
    number = settings.whole(name, value, f"a whole number {expected}")
    if not least <= number <= most:
        settings.refuse(name, f"a whole number {expected}", value)
    return number
