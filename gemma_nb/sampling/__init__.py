"""From logits to tokens, with the evidence of each choice."""
