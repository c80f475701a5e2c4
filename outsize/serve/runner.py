"""A worker's part of a step: its units of the model over its pages. It decides nothing: which pages and which tokens is for
the engine to say, and of several workers only the first has one; the others `follow` it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from outsize.distributed.relay import Relay
from outsize.memory.store import Store
from outsize.model.attach import Attachment
from outsize.model.route import Leg
from outsize.plan import Serving
from outsize.serve.attention import Paged
from outsize.serve.cache import Cache
from outsize.serve.far_index import FarIndex
from outsize.serve.layout import Layout, Span
from outsize.serve.leg import Cut
from outsize.serve.places import Places
from outsize.serve.recording import Forward, Inputs, record

TRIALS = (1, 1), (4, 2), (6, 4)  # tokens of a step that is recorded, and how many of them want logits
COMPARED = 5, 3
END = "end"  # the last order


class Runner:
    """Runs the attached `model` as `serving` says, or its `leg` of it, beside other workers on the `relay`. Far pages lie on
    the tier `disk`, or if there is an `index` of them on `kv`, and outlive the process."""

    def __init__(
        self,
        model: nn.Module,
        attachment: Attachment,
        store: Store,
        serving: Serving,
        leg: Leg | None = None,
        relay: Relay | None = None,
        index: FarIndex | None = None,
    ) -> None:
        self.model, self.store, self.serving, self.leg = model, store, serving, leg
        self.relay = relay or Relay()
        first = 0 if leg is None else leg.layers[0]
        self._open = ExitStack()
        self.cache = Cache(store, serving.layers, serving.pages, serving.page_tokens, first)
        self._open.callback(self.cache.close)
        self.places = None
        if serving.far_pages:
            tier = "disk" if index is None else "kv"
            self.places = Places(store, self.cache, tier, serving.far_pages, self.relay, index)
            self._open.callback(self.places.close)
        self._open.enter_context(attachment.call_by_call("step"))
        if leg is not None:
            self._open.callback(Cut(model, leg, self.relay).remove)
        self._ceiling = attachment.ceiling
        program = None if attachment.streams else self._record()
        self.recorded = program is not None
        self._forward: Forward = program or self._through_module

    def copy(self, source: int, target: int) -> None:
        """Fill one page with what another holds."""
        self.relay.tell("copy", source, target)
        self.cache.copy(source, target)

    @torch.inference_mode()
    def run(self, spans: list[Span], tokens: list[int], wanted: list[int]) -> torch.Tensor:
        """One packed forward over `tokens` of all `spans`: logits `[len(wanted), vocabulary]` after those that are `wanted`,
        by their place in the row. Of several workers the first has them."""
        self.relay.tell("run", spans, tokens, wanted)
        layout = Layout(spans, self.serving.page_tokens, self.cache.device)
        self.cache.clear(layout.begun())
        self._ceiling.keep()
        return self._forward(**self._inputs(layout, tokens, wanted or [0]))[0, : len(wanted)]

    def follow(self) -> None:
        """Do what the first worker does, until it ends. Raises RunError when it is lost."""
        verbs: dict[str, Any] = {"run": self.run, "copy": self.copy}
        verbs |= self.places.verbs() if self.places is not None else {}
        while (order := self.relay.hear())[0] != END:
            verb, *given = order
            verbs[verb](*given)

    def _inputs(self, layout: Layout, tokens: list[int], wanted: list[int]) -> Inputs:
        """Of a forward pass over `tokens`, with logits where they are `wanted`."""
        return {
            "input_ids": torch.tensor([tokens], device=self.cache.device),
            "position_ids": layout.positions(),
            "logits_to_keep": torch.tensor(wanted, device=self.cache.device),
            "paged": Paged(self.cache, layout),
        }

    def _through_module(self, **inputs: Any) -> torch.Tensor:
        return self.model(use_cache=False, **inputs).logits

    @torch.inference_mode()
    def _record(self) -> Forward | None:
        """The model's calls without the model, learnt in pages that nobody holds yet."""
        serving, size = self.serving, self.serving.page_tokens
        most = min(serving.step_tokens, serving.context, serving.pages * size)
        longer = [(tokens, min(serving.seats, tokens)) for tokens in (most // 4 | 1, most) if tokens > TRIALS[-1][0]]
        trials = []
        for tokens, logits in (*TRIALS, *longer, COMPARED):
            layout = Layout([Span(range(-(-tokens // size)), 0, tokens)], size, self.cache.device)
            ids = [number % self.model.config.get_text_config().vocab_size for number in range(tokens)]  # pyright: ignore
            trials.append(self._inputs(layout, ids, list(range(logits))))
        with self.relay.rehearsing():
            found = record(self._through_module, trials, _sizes)
        self.cache.clear(range(-(-most // size)))
        return found

    def close(self) -> None:
        """Let go of the cache and the module; other workers end too."""
        self.relay.tell(END)
        self._open.close()


def _sizes(inputs: Inputs) -> tuple[int, int]:
    """Tokens of a step, and how many of them want logits."""
    return inputs["input_ids"].shape[1], inputs["logits_to_keep"].shape[0]
