"""All that exists because the machine is a CPU: storages of weights, and products that suit it.

What the model asks of it are a few primitives; README.md here says what each gains, and where.
"""
