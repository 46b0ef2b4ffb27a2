"""How vLLM finds a chat template."""


def resolve_chat_template(tokenizer, chat_template, tools, *, model_config):
    """The tokenizer's."""
    return tokenizer.chat_template
