"""Changes to what a model computes, as pytrees that act inside its forward pass.

An intervention acts at a capture site, in chosen layers and heads, at chosen absolute positions.
Positions, not slots or steps, decide, so a full pass, a prefill in pieces and cached decoding all
compute the same under it.  All numbers in it are traced: other values, layers, heads or positions
of the same count use the program that is compiled already.

    patched = model.intervene(gnb.AblateHeads({5: [2]}), gnb.Steer(9, vector, scale=4.0))

Several interventions at one site act in the order in which they were given.
"""

from gemma_nb.interventions.attention import KnockOut, ReplaceAttention
from gemma_nb.interventions.base import Intervention, Interventions, LayerEdit
from gemma_nb.interventions.heads import AblateHeads, ScaleHeads
from gemma_nb.interventions.positions import Where
from gemma_nb.interventions.tokens import ForceToken
from gemma_nb.interventions.vectors import AblateMLP, EditNeuron, Patch, Steer

__all__ = [
    "AblateHeads",
    "AblateMLP",
    "EditNeuron",
    "ForceToken",
    "Intervention",
    "Interventions",
    "KnockOut",
    "LayerEdit",
    "Patch",
    "ReplaceAttention",
    "ScaleHeads",
    "Steer",
    "Where",
]
