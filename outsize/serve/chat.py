"""Messages to the tokens of a prompt, by the model's own template."""

from __future__ import annotations

from typing import Any

from outsize.errors import OptionError


def chat_tokens(tokenizer: Any, messages: Any) -> tuple[int, ...]:
    """Token ids of a conversation `[{"role": ..., "content": ...}, ...]`, ready for the assistant's turn.

    Raises OptionError when the model has no template, or the template does not take these messages."""
    if tokenizer is None or not tokenizer.chat_template:
        raise OptionError("The model has no chat template beside its weights; give a prompt instead of messages.")
    try:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except Exception as problem:  # a template is a program of the model's maker, and raises what it likes
        raise OptionError(f"The model's chat template does not take these messages: {problem}") from problem
    return tuple(found["input_ids"])
