"""Checkpoints of every format; each reader yields the official parameter tree."""
