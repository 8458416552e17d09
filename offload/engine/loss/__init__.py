"""The loss of language models, without the logits of all tokens at once."""
