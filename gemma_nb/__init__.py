"""Chat with Gemma in a notebook, and see what the model computed.

    import gemma_nb as gnb

Public names are imported on first use, so that `import gemma_nb` stays cheap: it starts no JAX
device and imports no widget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma_nb.lazy import attach

__version__ = "0.1.0"

# Public name -> the module that defines it.  A module stands for itself.
_PUBLIC = {
    # models
    "load": "gemma_nb.loading",
    "list_models": "gemma_nb.checkpoints.catalog",
    "GemmaTransformer": "gemma_nb.model",
    "GemmaInputs": "gemma_nb.model",
    "TransformerConfig": "gemma_nb.config",
    "presets": "gemma_nb.presets",
    "nn": "gemma_nb.nn",
    # chat
    "ChatSession": "gemma_nb.chat.session",
    "Sampling": "gemma_nb.sampling.settings",
    "Capture": "gemma_nb.sampling.settings",
    # inspection
    "Trace": "gemma_nb.interp.trace",
    "trace": "gemma_nb.interp.trace",
    "list_sites": "gemma_nb.sites",
    "logit_lens": "gemma_nb.interp.lens",
    "token_statistics": "gemma_nb.interp.lens",
    "residual_norms": "gemma_nb.interp.lens",
    "direct_logit_attribution": "gemma_nb.interp.attribution",
    "attention_rollout": "gemma_nb.interp.attribution",
    "value_weighted_attention": "gemma_nb.interp.attribution",
    "token_attribution": "gemma_nb.interp.gradients",
    "head_statistics": "gemma_nb.interp.heads",
    "head_scores": "gemma_nb.interp.heads",
    "activation_patching": "gemma_nb.interp.patching",
    "top_activations": "gemma_nb.interp.features",
    "SparseAutoencoder": "gemma_nb.interp.autoencoders",
    "Transcoder": "gemma_nb.interp.autoencoders",
    "steering_vector": "gemma_nb.interp.steering",
    "LogitDifference": "gemma_nb.interp.metrics",
    "Logit": "gemma_nb.interp.metrics",
    "AblateHeads": "gemma_nb.interventions",
    "AblateMLP": "gemma_nb.interventions",
    "EditNeuron": "gemma_nb.interventions",
    "ForceToken": "gemma_nb.interventions",
    "KnockOut": "gemma_nb.interventions",
    "Patch": "gemma_nb.interventions",
    "ReplaceAttention": "gemma_nb.interventions",
    "ScaleHeads": "gemma_nb.interventions",
    "Steer": "gemma_nb.interventions",
    "plots": "gemma_nb.plots",
    # panels
    "ChatApp": "gemma_nb.app",
    "widgets": "gemma_nb.widgets",
    # errors
    "errors": "gemma_nb.errors",
    "CheckpointError": "gemma_nb.errors",
}

__all__ = ["__version__", *_PUBLIC]
__getattr__, __dir__ = attach(__name__, globals(), _PUBLIC)

if TYPE_CHECKING:
    from gemma_nb import errors, nn, plots, presets, widgets
    from gemma_nb.app import ChatApp
    from gemma_nb.chat.session import ChatSession
    from gemma_nb.checkpoints.catalog import list_models
    from gemma_nb.config import TransformerConfig
    from gemma_nb.errors import CheckpointError
    from gemma_nb.interp.attribution import (
        attention_rollout,
        direct_logit_attribution,
        value_weighted_attention,
    )
    from gemma_nb.interp.autoencoders import SparseAutoencoder, Transcoder
    from gemma_nb.interp.features import top_activations
    from gemma_nb.interp.gradients import token_attribution
    from gemma_nb.interp.heads import head_scores, head_statistics
    from gemma_nb.interp.lens import logit_lens, residual_norms, token_statistics
    from gemma_nb.interp.metrics import Logit, LogitDifference
    from gemma_nb.interp.patching import activation_patching
    from gemma_nb.interp.steering import steering_vector
    from gemma_nb.interp.trace import Trace, trace
    from gemma_nb.interventions import (
        AblateHeads,
        AblateMLP,
        EditNeuron,
        ForceToken,
        KnockOut,
        Patch,
        ReplaceAttention,
        ScaleHeads,
        Steer,
    )
    from gemma_nb.loading import load
    from gemma_nb.model import GemmaInputs, GemmaTransformer
    from gemma_nb.sampling.settings import Capture, Sampling
    from gemma_nb.sites import list_sites
