"""What tells a model and a tokenizer from others, wherever their files are."""

from __future__ import annotations

import hashlib
import json
from typing import Any

INCIDENTAL = ("transformers_version", "_name_or_path")  # says nothing about the numbers


def fingerprint_model(config: Any) -> str:
    """Of a transformers configuration: 16 hexadecimal digits."""
    values = {key: value for key, value in config.to_dict().items() if key not in INCIDENTAL}
    return _digest(json.dumps(values, sort_keys=True, default=str))


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Of its vocabulary and special tokens: 16 hexadecimal digits."""
    return _digest(json.dumps([sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)]))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
