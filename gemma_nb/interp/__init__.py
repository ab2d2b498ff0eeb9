"""Looking inside a forward pass."""
