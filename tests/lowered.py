"""Uses the package on a small model, and lowers every program that this ran for cuda and for tpu.

Run by test_lowering.py, in processes of their own: `jax.jit` is replaced before the package is
imported, so that each program remembers what it was given.  What it prints is a `Report` as JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PACKAGE = Path(__file__).parents[1] / "gemma_nb"
PLATFORMS = ("cuda", "tpu")
_SHAPES = 2  # so many of the shapes that a program was given are lowered
_jit = jax.jit
_programs: list[Program] = []


@dataclasses.dataclass
class Report:
    """What happened.

    Attributes:
      made: names of the package's programs, `module.function`.
      lowered: of those, what was lowered for all platforms.
      sites: where they were made, "file:line" of every line of the package on the way there.
      failed: "name for platform" -> the end of the error.
    """

    made: list[str]
    lowered: list[str]
    sites: list[str]
    failed: dict[str, str]


class Program:
    """A jitted function that remembers the shapes of its arguments."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self.name = f"{function.__module__.removeprefix('gemma_nb.')}.{function.__name__}"
        self.sites = list(_sites())
        self.given: dict[str, tuple[Any, Any]] = {}
        self._jitted: Any = _jit(function, **options)
        functools.update_wrapper(self, function)
        _programs.append(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._note(args, kwargs)
        return self._jitted(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        self._note(args, kwargs)
        return self._jitted.lower(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        self._note(args, kwargs)
        return self._jitted.trace(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_jitted"], name)

    def __get__(self, instance: Any, _: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def lower_for(self, platform: str) -> None:
        """Lowers it for another platform, for every shape that it was given."""
        for args, kwargs in self.given.values():
            traced = self._jitted.trace(*args, **kwargs)
            assert "module" in traced.lower(lowering_platforms=(platform,)).as_text()

    def _note(self, args: Any, kwargs: Any) -> None:
        leaves, tree = jax.tree.flatten((args, kwargs))
        # Inside of another program it is a part of that one.
        if len(self.given) < _SHAPES and not any(isinstance(x, jax.core.Tracer) for x in leaves):
            shapes = [_shape(x) for x in leaves]
            self.given.setdefault(f"{shapes} {tree}", jax.tree.unflatten(tree, shapes))


def _shape(x: Any) -> Any:
    if isinstance(x, jax.Array):
        spread = x.sharding if len(x.sharding.device_set) > 1 else None
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=spread, weak_type=getattr(x, "weak_type", False)
        )
    if isinstance(x, np.ndarray | np.generic):
        # Of 64 bits it is taken as one of 32, as when it is given.
        return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))
    return x


def _sites() -> Any:
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents:
            yield f"{path.relative_to(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back


def remembering_jit(function: Any = None, **options: Any) -> Any:
    """`jax.jit`; a function of the package becomes a `Program`."""
    if function is None:
        return functools.partial(remembering_jit, **options)
    own = str(getattr(function, "__module__", "")).startswith("gemma_nb.")
    return Program(function, options) if own else _jit(function, **options)


def report() -> Report:
    """Lowers everything that was run so far."""
    lowered, failed = set(), {}
    for program in _programs:
        for platform in PLATFORMS if program.given else ():
            try:
                program.lower_for(platform)
            except Exception:
                failed[f"{program.name} for {platform}"] = traceback.format_exc()[-2000:]
            lowered.add(program.name)
    made = sorted({program.name for program in _programs})
    sites = sorted({site for program in _programs for site in program.sites})
    return Report(made, sorted(lowered), sites, failed)


# --- what is run


def talk(model: Any, tokenizer: Any, *, own: bool = True) -> None:
    """A conversation with all that the engine can do; of a wrapped model, what it can do there."""
    import gemma_nb as gnb

    capture = gnb.Capture(top_k=3, **({"attention_layers": "all"} if own else {}))
    chat = gnb.ChatSession(
        model, tokenizer, capture=capture, cache_length=min(2048, model.config.max_context)
    )
    settings = [
        gnb.Sampling(temperature=0, max_new_tokens=4),
        gnb.Sampling(temperature=0.7, top_k=5, top_p=0.9, min_p=0.01, seed=1, max_new_tokens=3),
        gnb.Sampling(seed=2, max_new_tokens=3, forbidden=(7,)),
        gnb.Sampling(top_p=0.95, seed=3, max_new_tokens=3),
    ]
    for sampling in settings:
        chat.sampling = sampling
        chat.chat("Hello there")
    turn = next(t for t in chat.turns if t.tokens)
    chat.fork(turn.tokens[1], with_token=9)
    chat.chat("A long text, " * 40)  # in several pieces, behind others; the cache grows
    chat.undo()
    chat.regenerate()
    fork = chat.fork(turn.tokens[1], with_token=11)
    chat.diff(turn, fork)
    chat.sample("Hello", n=4)  # so many at once
    chat.sample_each(["Hello", "A bird in the hand", "is worth two", "in the bush"])
    last = chat.chat("Hello")
    if own:
        chat.look(last.tokens[1])
        chat.lens(last.tokens[1])
        chat.trace(last).residual.sum()
        chat.intervene(gnb.AblateHeads({1: [0]}), at=last.tokens[1])


def look_inside(model: Any, tokenizer: Any, *, own: bool = True) -> None:
    """All that inspection can do; of a wrapped model, what it shows."""
    import gemma_nb as gnb

    text = "A bird in the hand is worth two"
    ids = tokenizer.encode(text, bos=True)
    model([ids])
    trace = gnb.trace(model, text, tokenizer=tokenizer, sites=())
    gnb.trace(model, text, tokenizer=tokenizer, sites=[s.name for s in gnb.list_sites(model)])
    if not own:
        return
    for part in ({"heads": [1]}, {"positions": [2, 3]}):
        trace.get("attention", **part)
        trace.get("z", **part)
    # So long a text goes through in pieces; the second one begins as the first.
    many = min(1280, model.config.max_context // 2 + 100) // len(ids)
    long = gnb.trace(model, ids * many, sites=())
    long.residual.sum()
    longer = gnb.trace(model, ids * (many + 1), sites=())
    longer.residual.sum()
    gnb.trace(model, ids, sites="final").final.sum()
    gnb.logit_lens(trace, k=3, watch=[5])
    gnb.token_statistics(trace)
    for by in ("component", "head", "token"):
        position = {"position": -1} if by == "token" else {}
        gnb.direct_logit_attribution(trace, 5, by=by, **position)
    for method in ("gradient_x_input", "integrated_gradients"):
        gnb.token_attribution(trace, 5, method=method, steps=2)
    gnb.head_scores(model, length=6)
    gnb.value_weighted_attention(trace)
    gnb.attention_rollout(trace)
    gnb.top_activations(model, tokenizer, [text], layer=1, neuron=3)
    changed = model.intervene(gnb.Steer(1, np.ones(model.config.embed_dim), 2.0))
    other = [*ids[:-1], (ids[-1] + 1) % 99]
    for metric in (gnb.LogitDifference(5, 6), gnb.Logit(5), lambda logits: logits.max()):
        gnb.activation_patching(changed, ids, other, metric, over=["layer"], progress=False)
    gnb.activation_patching(model, ids, other, gnb.Logit(5), over=["head"], progress=False)
    rng = np.random.default_rng(0)
    width = model.config.embed_dim
    sae = gnb.SparseAutoencoder(
        w_enc=jnp.asarray(rng.normal(size=(width, 50)), jnp.float32),
        b_enc=jnp.zeros(50),
        w_dec=jnp.asarray(rng.normal(size=(50, width)), jnp.float32),
        b_dec=jnp.zeros(width),
        threshold=jnp.zeros(50),
        layer=1,
    )
    sae.features(trace)
    sae.top_features(trace, 3)
    sae.unexplained(trace)


def wrapped(model: Any) -> Any:
    """The same model behind the interface of gm's modules, which show what they returned."""
    from gemma_nb.nn import adapt
    from gemma_nb.sites import SITES
    from tests.nn.test_wrapped import Plain

    class Shown(Plain):
        def apply(self, variables: Any, tokens: Any, **call: Any) -> Any:
            if call.pop("capture_intermediates", None) is None:
                return super().apply(variables, tokens, **call)
            output, state = super().apply(variables, tokens, **call)

            def called(name: str, i: int | None = None, *, cached: bool = False) -> Any:
                value = SITES[name].value(state["intermediates"], i)
                return {"__call__": ((None, value) if cached else value,)}

            shown = {"embedder": {"encode": called("embed")["__call__"]}}
            shown["final_norm"] = called("final")
            for i in range(model.config.num_layers):
                shown[f"layer_{i}"] = {
                    **called("residual", i, cached=True),
                    "attn": {
                        **called("attn_raw", i, cached=True),
                        "attention_weights": called("attention", i),
                    },
                    "mlp": called("mlp_raw", i),
                    "pre_attention_norm": called("attn_in", i),
                    "post_attention_norm": called("attn_out", i),
                    "pre_ffw_norm": called("mlp_in", i),
                    "post_ffw_norm": called("mlp_out", i),
                }
            return output, {"intermediates": shown}

    return model.replace(transformer=adapt(Shown(model.transformer), model.config))


def main(kind: str) -> None:
    """Runs everything on one kind of model: see test_lowering.py."""
    jax.jit = remembering_jit
    if kind == "accelerator":
        # What the engine chooses where there is one; it computes on the CPU all the same.
        jax.default_backend = lambda: "gpu"
    import pkgutil

    import gemma_nb
    from tests import tiny

    for module in pkgutil.walk_packages(gemma_nb.__path__, "gemma_nb."):
        if not module.name.endswith("__main__"):
            __import__(module.name)
    tokenizer = tiny.tokenizer()
    model = tiny.model(tokenizer.vocab_size)
    if kind == "mesh":
        from tests.on_eight_devices import random_model

        model = random_model(8).place("auto")
    if kind == "wrapped":
        model = wrapped(model)
    own = kind != "wrapped"
    talk(model, tokenizer, own=own)
    if kind == "default":
        talk(model.replace(storage="int8"), tokenizer, own=own)
    look_inside(model, tokenizer, own=own)
    print(json.dumps(dataclasses.asdict(report())))


if __name__ == "__main__":
    main(sys.argv[1])
