"""All that exists because the machine is a CPU: storages of weights, and products that suit it.

The model calls its primitives; README.md here says of each where it is, why, and what it gains.
"""
