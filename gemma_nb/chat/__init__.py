"""Conversations: turns, their tokens with evidence, and the session that makes them."""
