"""Models on disk: metadata, architecture and tokenizer, read without the weights."""
