"""Parity: our forward pass against Hugging Face's Gemma 1, 2 and 3 on the same weights.

`test_recorded.py` runs everywhere, against outputs recorded by `python -m tests.parity.record`;
`test_live.py` needs torch and transformers (`constraints.txt`) and recomputes everything.
"""
