"""Models asked: prompts in, text out, one token after another."""
