"""Adapters, which are not used."""


class LoRARequest:
    """An adapter."""
