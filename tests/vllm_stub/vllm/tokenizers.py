"""How vLLM finds a tokenizer."""

from transformers import AutoTokenizer


def get_tokenizer(name, *, tokenizer_mode, trust_remote_code, revision):
    """That of transformers."""
    return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision)
