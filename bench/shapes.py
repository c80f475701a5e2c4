"""The models that the benchmark trains, with random weights, and the text it trains them on."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SEQUENCE_LENGTH = 512
LONGEST = 4096  # tokens that a model has positions for


@dataclass(frozen=True)
class Shape:
    """A Llama, or one of another `family`. `heads` attend, `kv_heads` hold keys and values; `tied`: the head is the
    embedding."""

    name: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    family: str = "llama"

    @property
    def layer_parameters(self) -> int:
        attention = self.hidden * self.hidden * 2 * (1 + self.kv_heads / self.heads)
        return int(attention) + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def parameters(self) -> int:
        tables = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return self.layers * self.layer_parameters + tables + self.hidden

    def config(self) -> Any:
        from transformers import AutoConfig

        names = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "gpt2": "GPT2LMHeadModel"}
        own = {
            "num_hidden_layers": self.layers,
            "intermediate_size": self.intermediate,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": LONGEST,
            **({"head_dim": self.hidden // self.heads} if self.family == "qwen3" else {}),
        }
        gpt2 = {"n_layer": self.layers, "n_inner": self.intermediate, "n_positions": LONGEST, "resid_pdrop": 0.0}
        gpt2 |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return AutoConfig.for_model(
            self.family,
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            tie_word_embeddings=self.tied,
            bos_token_id=0,
            eos_token_id=0,
            dtype="bfloat16",
            architectures=[names[self.family]],
            **(gpt2 if self.family == "gpt2" else own),
        )


SMOLLM2 = Shape("SmolLM2-135M", 49152, 576, 1536, 30, 9, 3, tied=True)
LLAMA = Shape("Llama 1.3B", 32000, 2048, 5504, 24, 16, 16, tied=False)
STACK = Shape("hidden 1024", 8192, 1024, 2816, 12, 8, 8, tied=False)
WIDE = Shape("4 layers of 2048", 32000, 2048, 5504, 4, 16, 16, tied=False)
GPT2 = Shape("GPT-2, 6 layers", 50257, 768, 3072, 6, 12, 12, tied=True, family="gpt2")
QWEN3 = Shape("Qwen3, 6 layers", 32000, 1024, 3072, 6, 16, 8, tied=True, family="qwen3")
TINY = Shape("tiny", 8192, 512, 1408, 4, 8, 4, tied=True)


def stack(layers: int) -> Shape:
    """The same width with another number of layers."""
    return replace(STACK, name=f"{STACK.name}, {layers} layers", layers=layers)


SHAPES = {
    shape.name: shape
    for shape in (SMOLLM2, LLAMA, WIDE, GPT2, QWEN3, TINY, *(stack(layers) for layers in (4, 12, 24, 48)))
}


def token_ids(vocabulary: int) -> list[int]:
    """Python's own documentation, each word under a number of its own as far as the vocabulary goes."""
    from pydoc_data.topics import topics

    words = " ".join(topics.values()).split()
    return [zlib.crc32(word.encode()) % vocabulary for word in words]


def write_text(shape: Shape, path: Path) -> None:
    """The words as the model's tokenizer (`write_model`) spells them."""
    path.write_text(" ".join(f"w{number}" for number in token_ids(shape.vocabulary)))


def write_model(shape: Shape, folder: Path) -> None:
    """A Hugging Face folder with random weights and a tokenizer of as many made-up words. Memory: 16 MiB."""
    import torch
    from transformers import AutoModelForCausalLM

    from outsize.model.export import tensors_of, write_safetensors

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16)
    tensors = {name: tensor for name, tensor in tensors_of(model).items() if isinstance(tensor, torch.nn.Parameter)}
    generator = torch.Generator().manual_seed(0)

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        rows = (stop - start, *tensors[name].shape[1:])
        if "norm" in name:
            return torch.ones(rows, dtype=torch.bfloat16)
        return torch.randn(rows, generator=generator).mul_(0.02).to(torch.bfloat16)

    write_safetensors(folder, {name: (tuple(t.shape), torch.bfloat16) for name, t in tensors.items()}, read)
    shape.config().save_pretrained(folder)
    _tokenizer(shape.vocabulary).save_pretrained(folder)


def _tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", unk_token="w0")
