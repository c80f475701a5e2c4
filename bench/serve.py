"""SmolLM2-135M, all resident: tokens/s of decoding and of reading prompts, beside transformers' own generate.

    python bench/serve.py --model build/smollm2.gguf

Both run in this process in turns, in bf16; what counts is the ratio."""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
from time import perf_counter
from typing import Any

# As the command line sets it: the engine's thread and this one have a pool of compute threads each, and one must not spin
# while the other works. Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch  # noqa: E402

import outsize  # noqa: E402

PROMPT, NEW = 128, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="build/smollm2.gguf")
    parser.add_argument("--memory", default="3GiB")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    reference = whole(options.model)
    print("| batch | outsize tokens/s | transformers tokens/s | ratio |\n|---|---|---|---|")
    with outsize.Engine(options.model, memory=options.memory, context=1024) as engine:
        for batch in options.batches:
            ours, theirs = [], []
            for turn in range(options.rounds):
                prompts = torch.randint(5, 40_000, (batch, PROMPT), generator=torch.Generator().manual_seed(turn))
                ours.append(decode_ours(engine, prompts))
                theirs.append(decode_theirs(reference, prompts))
            one, other = statistics.median(ours), statistics.median(theirs)
            print(f"| {batch} | {one:.0f} | {other:.0f} | {one / other:.2f} |", flush=True)
        reading(engine, reference, options.rounds)


def reading(engine: Any, reference: Any, rounds: int) -> None:
    ours, theirs = [], []
    for prompt in torch.randint(5, 40_000, (rounds, 512), generator=torch.Generator().manual_seed(9)):
        ours.append(512 / seconds(functools.partial(engine.generate, [prompt.tolist()], max_new_tokens=1)))
        theirs.append(512 / seconds(functools.partial(generate, reference, prompt[None], 1)))
    one, other = statistics.median(ours), statistics.median(theirs)
    print(f"| reading 512 | {one:.0f} | {other:.0f} | {one / other:.2f} |")


def whole(path: str) -> Any:
    """The model as transformers has it, through a folder of files."""
    from safetensors.torch import save_file

    from outsize.model.load import open_model

    source = open_model(path)
    with tempfile.TemporaryDirectory() as folder:
        from transformers import AutoModelForCausalLM

        tensors = {name: source.read(name).to(torch.bfloat16).contiguous() for name in source.shapes()}
        save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})
        source.save_companions(folder, torch.bfloat16)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def seconds(work: Any) -> float:
    started = perf_counter()
    work()
    return perf_counter() - started


def decode_ours(engine: Any, prompts: torch.Tensor) -> float:
    """Tokens/s of decoding alone: the time for NEW tokens, less that for one."""
    asked = prompts.tolist()
    first = seconds(lambda: engine.generate(asked, max_new_tokens=1, ignore_end=True))
    asked = (prompts + 1).tolist()  # others, so that nothing is known of them
    return tokens_a_second(
        len(asked), seconds(lambda: engine.generate(asked, max_new_tokens=NEW, ignore_end=True)), first
    )


def decode_theirs(model: Any, prompts: torch.Tensor) -> float:
    first = seconds(lambda: generate(model, prompts, 1))
    return tokens_a_second(len(prompts), seconds(lambda: generate(model, prompts + 1, NEW)), first)


def tokens_a_second(batch: int, all_tokens: float, first: float) -> float:
    return batch * (NEW - 1) / (all_tokens - first)


def generate(model: Any, prompts: torch.Tensor, new: int) -> torch.Tensor:
    mask = torch.ones_like(prompts)
    with torch.no_grad():
        return model.generate(
            prompts, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )


if __name__ == "__main__":
    main()
