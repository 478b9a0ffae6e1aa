"""From logits to a token: pure functions that the compiler composes behind the vocabulary projection."""
