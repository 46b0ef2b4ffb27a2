"""LoRA adapters: extracted from the difference of two models, and verified."""
