"""The benchmark's Llama as llama.cpp reads it: one GGUF file in bf16."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any


def write(place: str) -> dict[str, Any]:
    """`place`/model as `place`/model.gguf, unless it is there. Memory: one tensor.

    Queries and keys keep the order of channels that transformers has, where llama.cpp wants another: with random weights
    nobody minds, and it takes as long."""
    path = Path(place) / "model.gguf"
    if path.exists():
        return {}
    import gguf
    import torch

    from outsize.model.load import open_model

    source = open_model(str(Path(place) / "model"))
    draft, kinds = path.with_suffix(".draft"), gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(draft, "llama")
    _describe(writer, source.config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, source.config.num_hidden_layers)
    for name, (shape, _) in source.shapes().items():
        kind, nbytes = (kinds.F32, 4) if len(shape) == 1 else (kinds.BF16, 2)
        in_bytes = (*shape[:-1], shape[-1] * nbytes)
        bytes_kind = torch.empty(0, dtype=torch.uint8).numpy().dtype
        writer.add_tensor_info(names.get_name(name, (".weight",)), in_bytes, bytes_kind, math.prod(in_bytes), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (shape, _) in source.shapes().items():
        tensor = source.read(name).to(torch.float32 if len(shape) == 1 else torch.bfloat16)
        writer.write_tensor_data(tensor.contiguous().view(torch.uint8).numpy())
    writer.close()
    draft.replace(path)
    return {}


def _describe(writer: Any, config: Any) -> None:
    """Sizes, and a vocabulary of made-up words."""
    import gguf

    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"w{number}" for number in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
