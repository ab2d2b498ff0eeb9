"""Text and tokens: tokenizer, streaming detokenizer, chat templates."""
