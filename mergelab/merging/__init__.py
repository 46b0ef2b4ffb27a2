"""Merging a recipe into a model folder or a live model, and verifying the result."""
