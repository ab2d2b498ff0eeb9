"""The contract with google-deepmind/gemma (gm): its samplers on our modules, ours on its modules.

Needs gm, which needs Python 3.12: `make contract` makes an environment for it.
"""
