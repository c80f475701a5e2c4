"""A real model, SmolLM2-135M in float32: the answers are those of transformers' own generate."""

from __future__ import annotations

import torch
from models import smollm2
from serving import ask, bound_model, run

from outsize.model.load import open_model

NEW = 12
TEXTS = [
    "The with statement is used to",
    "Once upon a time, in a small village between two mountains, there lived a clockmaker who",
    "def fibonacci(n):\n    ",
    "Water boils at a lower temperature on high mountains, because the pressure of the air is lower there. "
    "That is why cooking an egg takes",
]


def test_the_real_smollm2_answers_as_in_transformers() -> None:
    source = open_model(str(smollm2()))
    prompts = [list(source.tokenizer()(text)["input_ids"]) for text in TEXTS]

    def make() -> torch.nn.Module:
        model = source.build(torch.float32)
        for name in [name for name, _ in model.named_parameters()]:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, torch.nn.Parameter(source.read(name).float(), False))
        model.tie_weights()
        return model

    with bound_model(make, prompts=prompts, new=NEW) as model:
        for pages, seats, step_tokens, far in [(60, 4, 128, 0), (6, 3, 24, 40)]:
            with model.engine(pages, seats, step_tokens, far_pages=far) as engine:
                heard = [ask(engine, prompt, max_new_tokens=NEW)[1] for prompt in prompts]
                run(engine)
                assert [one.tokens() for one in heard] == model.answers
