"""Compiled programs that are stored across processes, and found again without being traced.

JAX's compilation cache finds a program by what it was lowered to, so every process traces and
lowers it first: most of two seconds of Python before the first token of Gemma 3 270M.  Here it is
found by what it would be traced from: the source, the versions, the settings and the shapes.

State of the whole process, with what keys it and what frees it:

    state                     keyed by                               freed by
    CachedJit's programs      the function and what is static,       `forget`, also when memory
                              the arguments' shapes, JAX's settings  mappings run out (`limits`)
    `engine` programs         functools.cache by module, structure   the end of the process; they
    (sampling, nn)            of the weights, what is captured       hold no arrays
    prepared weights          module, storage and identities of the  the last decoder that holds
    (sampling.weights)        parameters                             them (weak values)
    compilations ahead begun  the program, by size and structure     the end of the process
    (sampling.compile_ahead)  of the interventions
    stored programs (disk)    source, versions, machine; then the    limit_bytes("programs"), and
    (`files`)                 digest of `names.program_name`         all but 4 generations
    JAX's own cache (disk)    JAX's key                              limit_bytes("jax")
    (`jax_cache`)
"""

from gemma_nb.executables.cached_jit import CachedJit, Kept, forget, tried_together
from gemma_nb.executables.files import folder
from gemma_nb.executables.prefetch import begin_prefetch, end_prefetch
from gemma_nb.executables.settings import ours, pinned

__all__ = [
    "CachedJit",
    "Kept",
    "begin_prefetch",
    "end_prefetch",
    "folder",
    "forget",
    "ours",
    "pinned",
    "tried_together",
]
