"""What a model folder holds: metadata, architecture, tokenizer; read without its weights."""
