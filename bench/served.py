"""Outsize's serving, one configuration a process; where the model fits, by turns with transformers beside it.

Rates are tokens/s. Decoding is timed while every sequence of the batch decodes: from the moment the last has its first
token to the moment the first is finished."""

from __future__ import annotations

import functools
import gc
import random
import statistics
import threading
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from cgroup import make_cold, memory_cgroup
from rivals import WORDS, Elsewhere, seconds

PROMPT = 128  # tokens
BATCH = 8  # of transformers' static batches

Work = list[tuple[list[int], int]]  # prompts, and how many tokens to answer


def open_engine(model: str, **options: Any) -> Any:
    """As the commands `outsize serve` and `outsize generate` do."""
    from outsize.machine.allocator import limit_heaps

    limit_heaps()
    import outsize

    return outsize.Engine(model, **options)


# -- past memory --------------------------------------------------------------------------------------------------------


def streamed(
    place: str,
    memory: int,
    batches: list[int],
    new: int,
    limit: int | None = None,
    weights: str = "stored",
) -> dict[str, Any]:
    """Decode with what fits near `memory` bytes, the rest streamed; after one sequence the same bytes are read alone.
    `near`: part of the weights that stay; `roofline`: seconds of reading alone for one of a step that reads them."""
    make_cold(Path(place))
    with memory_cgroup(limit):
        model, most = str(Path(place) / "model"), max(batches)
        options = {"context": len(WORDS) + new, "concurrency": most, "step_tokens": len(WORDS) * most, "scratch": place}
        with open_engine(model, memory=memory, weights=weights, **options) as engine:
            found: dict[str, Any] = {"near": _near(engine), "planned_peak_bytes": engine.plan.predicted.host_peak_bytes}
            for batch in batches:
                before, steps = _read_so_far(engine), engine.engine.totals.steps
                rate = decode(engine, [[40 + n, *WORDS[1:]] for n in range(batch)], new)
                found[f"b{batch}"] = rate
                read = (_read_so_far(engine) - before) // (engine.engine.totals.steps - steps)
                if batch == 1 and read:
                    found |= {"bytes_read": read, "roofline": rate * seconds_to_read(place, read)}
            return found


def _near(engine: Any) -> float:
    sizes = {name: p.numel() * p.element_size() for name, p in engine.engine.model.named_parameters()}
    return sum(nbytes for name, nbytes in sizes.items() if name in engine.plan.near_weights) / sum(sizes.values())


def _read_so_far(engine: Any) -> int:
    return engine.engine.store.ledger.total_moved("disk", "host")


def seconds_to_read(place: str, nbytes: int) -> float:
    """So many bytes as a step does, and nothing else."""
    try:
        return _read_alone(place, nbytes)
    finally:
        gc.collect()  # else its memory counts in the peak of the server beside it


def _read_alone(place: str, nbytes: int) -> float:
    from outsize.memory.disk import DiskTier
    from outsize.memory.host import allocate_slab
    from outsize.memory.transfer import PIECE, Transfers

    path, ring = Path(place) / "floor", [allocate_slab(PIECE).random_() for _ in range(3)]
    tier, transfers = DiskTier(path), Transfers()
    try:
        extents = [tier.allocate(PIECE) for _ in range(-(-nbytes // PIECE))]
        for number, extent in enumerate(extents):  # what was never written would be read for nothing
            tier.write(extent, 0, ring[number % len(ring)])
        tier.flush()

        def read() -> None:
            tickets = [transfers.read(tier, extent, 0, ring[n % len(ring)]) for n, extent in enumerate(extents)]
            for ticket in tickets:
                ticket.wait()

        return seconds(read) * nbytes / (len(extents) * PIECE)
    finally:
        transfers.close()
        tier.close()
        path.unlink()


# -- all resident -------------------------------------------------------------------------------------------------------


def resident(
    model: str, memory: int, batches: list[int], new: int, rounds: int, weights: str = "stored"
) -> dict[str, Any]:
    """Decoding, reading a prompt of 512, and 32 mixed requests; each beside transformers' own generate, by turns."""
    draw, found = random.Random(0), {}
    with (
        closing(Elsewhere(model)) as theirs,
        open_engine(model, memory=memory, context=1024, weights=weights) as engine,
    ):

        def prompts(batch: int, length: int = PROMPT) -> list[list[int]]:
            return _prompts(draw, batch, length, engine.vocabulary)

        _by_turns(1, lambda: decode(engine, prompts(1), 4), lambda: theirs.decode(prompts(1), 4))  # to warm up
        for batch in batches:
            found[f"b{batch}"] = _by_turns(
                rounds,
                lambda batch=batch: decode(engine, prompts(batch), new),
                lambda batch=batch: theirs.decode(prompts(batch), new),
            )
        found["reading"] = _by_turns(
            rounds,
            lambda: 512 / seconds(functools.partial(engine.generate, prompts(1, 512), max_new_tokens=1)),
            lambda: 512 / theirs.generate([[(prompts(1, 512)[0], 1)]]),
        )
        sizes = random.Random(1)
        work = [(prompts(1, sizes.randint(32, 512))[0], sizes.randint(16, 128)) for _ in range(32)]
        tokens = sum(len(prompt) + new for prompt, new in work)
        static = [work[start : start + BATCH] for start in range(0, len(work), BATCH)]
        found["mixed"] = _by_turns(
            1, lambda: tokens / _seconds_of(engine, work), lambda: tokens / theirs.generate(static)
        )
    return found


def without_attention(model: str, memory: int, batches: list[int], new: int, rounds: int) -> dict[str, Any]:
    """As `resident`, and nobody attends: keys and values are neither written nor read. What is left are the unchanged
    module's own operations, which whoever runs them as they are has to wait for."""
    import torch

    from outsize.serve import attention

    def nothing(query: Any, *arguments: Any) -> Any:
        if torch.overrides.has_torch_function((query,)):
            return torch.overrides.handle_torch_function(nothing, (query,), query, *arguments)
        return query.transpose(1, 2)

    attention.paged_attention = nothing
    draw = random.Random(0)
    with open_engine(model, memory=memory, context=1024) as engine:
        decode(engine, _prompts(draw, 1, PROMPT, engine.vocabulary), 4)  # to warm up
        found: dict[str, list[float]] = {}
        for _ in range(rounds):
            for batch in batches:
                rate = decode(engine, _prompts(draw, batch, PROMPT, engine.vocabulary), new)
                found.setdefault(f"b{batch}", []).append(rate)
            prompt = _prompts(draw, 1, 512, engine.vocabulary)
            found.setdefault("reading", []).append(
                512 / seconds(functools.partial(engine.generate, prompt, max_new_tokens=1))
            )
    return {key: statistics.median(rates) for key, rates in found.items()}


def _by_turns(rounds: int, ours: Callable[[], float], theirs: Callable[[], float]) -> list[float]:
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return [statistics.median(side) for side in zip(*pairs, strict=True)]


def _prompts(draw: random.Random, batch: int, length: int, vocabulary: int) -> list[list[int]]:
    """Others every time, so that nothing is known of them."""
    return [[draw.randrange(5, vocabulary - 1) for _ in range(length)] for _ in range(batch)]


def _seconds_of(engine: Any, work: Work) -> float:
    """For requests that are all there at the beginning."""

    def run() -> None:
        running = engine.gathering()
        for number, (prompt, new) in enumerate(work):
            running.ask(number, tuple(prompt), _sampling(new))
        for _ in work:
            running.next()

    return seconds(run)


def _sampling(new: int) -> Any:
    from outsize.serving import Sampling

    return Sampling(max_new_tokens=new, ignore_end=True)


def decode(engine: Any, prompts: list[list[int]], new: int) -> float:
    """Tokens a second while all of `prompts` decode."""
    from outsize.serve.request import Request

    times: list[list[float]] = [[] for _ in prompts]
    finished: list[Any] = []
    all_finished = threading.Event()

    def listener(number: int) -> Callable[[Any], None]:
        def hear(event: Any) -> None:
            if event.chosen is not None:
                times[number].append(perf_counter())
            if event.finish is not None:
                finished.append(event)
                if len(finished) == len(prompts):
                    all_finished.set()

        return hear

    for number, prompt in enumerate(prompts):
        engine.submit(Request(tuple(prompt), _sampling(new), listener(number)))
    all_finished.wait()
    for event in finished:
        if event.error is not None:
            raise event.error
    start, end = max(heard[0] for heard in times), min(heard[-1] for heard in times)
    if end <= start:
        raise RuntimeError(f"{new} tokens are too few: the first sequence was finished before the last began")
    return sum(start < moment <= end for heard in times for moment in heard) / (end - start)


# -- fewer bits --------------------------------------------------------------------------------------------------------------


def losses(model: str, tokens: int) -> dict[str, Any]:
    """Mean loss over so many tokens of Python's documentation, 512 at a time, of the weights as stored and in fewer
    bits."""
    from pydoc_data.topics import topics

    import torch

    from outsize.model.load import open_model
    from outsize.serve.rounded import ROUNDINGS, use_rounded

    source = open_model(model)
    tokenizer = source.tokenizer()
    assert tokenizer is not None
    ids = torch.tensor(tokenizer.encode("\n".join(topics.values()))[:tokens]).view(-1, 512)
    found = {}
    for weights in ("stored", *ROUNDINGS):
        module = source.build(torch.bfloat16)
        read = source.read if weights == "stored" else use_rounded(module, weights, source.read)
        _fill(module, read)
        with torch.inference_mode():
            found[weights] = statistics.fmean(float(module(one[None], labels=one[None]).loss) for one in ids)
    return found


def _fill(module: Any, read: Callable[[str, int, int], Any]) -> None:
    import torch

    from outsize.model.weights import leave_meta

    leave_meta(module, torch.device("cpu"))
    for name, parameter in module.named_parameters():
        parameter.data = read(name, 0, parameter.shape[0]).to(parameter.dtype)


# -- conversations ------------------------------------------------------------------------------------------------------


def write_float32(model: str, folder: str) -> dict[str, Any]:
    """The same model, in which sums in another order decide between no two tokens."""
    import torch

    from outsize.model.load import open_model

    source = open_model(model)
    module, tokenizer = source.build(torch.float32), source.tokenizer()
    assert tokenizer is not None
    _fill(module, source.read)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {}


def conversations(
    model: str, memory: int, count: int, room: int, turns: int, far: bool = True, near: bool = False
) -> dict[str, Any]:
    """`count` conversations in turns, with pages near for `room` of them: seconds in all, and what was said. `far`: what does
    not fit is kept further away; `near`: everything fits, and `room` of them run at once."""
    from outsize import serving

    length = turns * (PROMPT + 32)
    plan_serving = serving.plan_serving

    def plan(*arguments: Any) -> Any:
        found = plan_serving(*arguments)
        pages = (count if near else room) * -(-length // found.serving.page_tokens)
        return replace(
            found, serving=replace(found.serving, pages=pages, far_pages=8 * pages if far and not near else 0)
        )

    serving.plan_serving = plan
    draw = random.Random(2)
    seats = room if near else count
    with open_engine(model, memory=memory, context=length + 16, concurrency=seats) as engine:
        said = _prompts(draw, count, PROMPT, engine.vocabulary)
        spent, new = 0.0, 0
        for _ in range(turns):
            started = perf_counter()
            answers = engine.generate(said, max_new_tokens=32, ignore_end=True)
            spent += perf_counter() - started
            new += sum(len(answer.tokens) for answer in answers)
            for words, answer, more in zip(
                said, answers, _prompts(draw, count, PROMPT - 1, engine.vocabulary), strict=True
            ):
                words += [*answer.tokens, *more]
        preemptions = engine.engine.scheduler.preemptions
    return {"seconds": spent, "new_tokens": new, "preemptions": preemptions, "said": zlib.crc32(str(said).encode())}
