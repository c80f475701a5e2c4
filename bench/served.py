"""Serving, one configuration a process: Outsize and what it stands beside, by turns where both fit the memory.

Rates are tokens/s. Decoding is timed while every sequence of the batch decodes: from the moment the last has its first
token to the moment the first is finished."""

from __future__ import annotations

import functools
import os
import random
import statistics
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from child import Skip

CGROUP = Path("/sys/fs/cgroup/memory")
PROMPT = 128  # tokens


@contextmanager
def memory_cgroup(limit: int | None) -> Iterator[None]:
    """This process in a memory cgroup of its own, for whatever it loads from here on."""
    if limit is None:
        yield
        return
    group, before = CGROUP / f"outsize-bench-{os.getpid()}", _cgroup()
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as problem:
        raise Skip(f"no memory cgroup can be made here: {problem}") from problem
    try:
        yield
    finally:
        (CGROUP / before / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def _cgroup() -> str:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return next(line.split(":memory:/")[1] for line in lines if ":memory:/" in line)


# -- past memory --------------------------------------------------------------------------------------------------------


def streamed(place: str, memory: int, batches: list[int], new: int, limit: int | None = None) -> dict[str, Any]:
    """Decode with what fits near `memory` bytes, the rest streamed. `near`: part of the weights that stay."""
    with memory_cgroup(limit):
        import outsize

        model, most = str(Path(place) / "model"), max(batches)
        with outsize.Engine(
            model, memory=memory, context=64, seats=most, step_tokens=16 * most, scratch=place
        ) as engine:
            found: dict[str, Any] = {"near": _near(engine)}
            for batch in batches:
                before, steps = _read_so_far(engine), engine.engine.totals.steps
                found[f"b{batch}"] = decode(engine, [[7 + n, *range(20, 31)] for n in range(batch)], new)
                steps = engine.engine.totals.steps - steps
                found["bytes_read"] = (_read_so_far(engine) - before) / steps
            return found


def _near(engine: Any) -> float:
    plan = engine.plan
    sizes = {name: p.numel() * p.element_size() for name, p in engine.engine.model.named_parameters()}
    return sum(nbytes for name, nbytes in sizes.items() if name in plan.near_weights) / sum(sizes.values())


def _read_so_far(engine: Any) -> int:
    return engine.engine.store.ledger.total_moved("disk", "host")


def disk(place: str, nbytes: int, rounds: int) -> dict[str, Any]:
    """Seconds to read so many bytes as a step does, and nothing else."""
    from outsize.memory.disk import DiskTier
    from outsize.memory.host import allocate_slab
    from outsize.memory.transfer import PIECE, Transfers

    path, ring = Path(place) / "floor", [allocate_slab(PIECE).random_() for _ in range(8)]
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

        found = [seconds(read) for _ in range(rounds)]
    finally:
        transfers.close()
        tier.close()
        path.unlink()
    return {"seconds": statistics.median(found) * nbytes / (len(extents) * PIECE)}


def accelerate(place: str, memory: int, new: int, limit: int | None = None) -> dict[str, Any]:
    """transformers with accelerate's offloading to disk, one sequence."""
    with memory_cgroup(limit), tempfile.TemporaryDirectory(dir=place) as folder:
        try:
            import torch
            from accelerate import __version__  # noqa: F401
            from transformers import AutoModelForCausalLM
        except ImportError as problem:
            raise Skip(f"{problem.name} is not installed") from problem
        model = AutoModelForCausalLM.from_pretrained(
            Path(place) / "model",
            dtype=torch.bfloat16,
            device_map="auto",
            max_memory={"cpu": memory},
            offload_folder=folder,
        )
        prompt = torch.arange(20, 32)[None]
        first = seconds(lambda: transformers_generate(model, prompt, 1))
        return {"b1": (new - 1) / (seconds(lambda: transformers_generate(model, prompt, new)) - first)}


# -- all resident -------------------------------------------------------------------------------------------------------


def resident(model: str, memory: int, batches: list[int], new: int, rounds: int) -> dict[str, Any]:
    """Decoding, reading a prompt of 512, and 32 mixed requests; each beside transformers' own generate, by turns."""
    import torch

    import outsize

    reference = whole_model(model)
    draw = random.Random(0)
    found: dict[str, Any] = {}
    with outsize.Engine(model, memory=memory, context=1024) as engine:
        for batch in batches:
            found[f"b{batch}"] = _by_turns(
                rounds,
                lambda batch=batch: decode(engine, _prompts(draw, batch, PROMPT), new),
                lambda batch=batch: transformers_decode(reference, torch.tensor(_prompts(draw, batch, PROMPT)), new),
            )
        found["reading"] = _by_turns(
            rounds,
            lambda: 512 / seconds(functools.partial(engine.generate, _prompts(draw, 1, 512), max_new_tokens=1)),
            lambda: 512 / seconds(functools.partial(_read_prompt, reference, torch.tensor(_prompts(draw, 1, 512)))),
        )
        found["mixed"] = _by_turns(1, lambda: mixed(engine, draw), lambda: transformers_mixed(reference, draw))
    return found


def _by_turns(rounds: int, ours: Callable[[], float], theirs: Callable[[], float]) -> list[float]:
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return [statistics.median(side) for side in zip(*pairs, strict=True)]


def _prompts(draw: random.Random, batch: int, length: int) -> list[list[int]]:
    """Others every time, so that nothing is known of them."""
    return [[draw.randrange(5, 40_000) for _ in range(length)] for _ in range(batch)]


def _mixture(draw: random.Random) -> list[tuple[list[int], int]]:
    sizes = random.Random(1)
    return [(_prompts(draw, 1, sizes.randint(32, 512))[0], sizes.randint(16, 128)) for _ in range(32)]


def mixed(engine: Any, draw: random.Random) -> float:
    """Tokens in and out a second, over 32 requests that are all there at the beginning."""
    work = _mixture(draw)

    def run() -> None:
        running = engine.gathering()
        for number, (prompt, new) in enumerate(work):
            running.ask(number, tuple(prompt), _sampling(new))
        for _ in work:
            running.next()

    return sum(len(prompt) + new for prompt, new in work) / seconds(run)


def transformers_mixed(model: Any, draw: random.Random, size: int = 8) -> float:
    """The same in static batches, padded: a batch takes as long as its longest answer."""
    import torch

    work = _mixture(draw)

    def run() -> None:
        for start in range(0, len(work), size):
            batch = work[start : start + size]
            longest = max(len(prompt) for prompt, _ in batch)
            padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in batch])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
            transformers_generate(model, padded, max(new for _, new in batch), mask)

    return sum(len(prompt) + new for prompt, new in work) / seconds(run)


# -- conversations ------------------------------------------------------------------------------------------------------


def conversations(model: str, memory: int, count: int, room: int, turns: int, far: bool) -> dict[str, Any]:
    """`count` conversations in turns, with pages near for `room` of them: seconds in all, and what was said."""
    import outsize
    from outsize import serving

    length = turns * (PROMPT + 32)
    plan_serving = serving.plan_serving

    def plan(*arguments: Any) -> Any:
        found = plan_serving(*arguments)
        pages = room * -(-length // found.serving.page_tokens)
        return replace(found, serving=replace(found.serving, pages=pages, far_pages=8 * pages if far else 0))

    serving.plan_serving = plan
    draw = random.Random(2)
    said = [prompt for prompt in _prompts(draw, count, PROMPT)]
    with outsize.Engine(model, memory=memory, context=length + 16, seats=count) as engine:
        spent, new = 0.0, 0
        for _ in range(turns):
            started = perf_counter()
            answers = engine.generate(said, max_new_tokens=32, ignore_end=True)
            spent += perf_counter() - started
            new += sum(len(answer.tokens) for answer in answers)
            for words, answer, more in zip(said, answers, _prompts(draw, count, PROMPT - 1), strict=True):
                words += [*answer.tokens, *more]
        preemptions = engine.engine.scheduler.preemptions
    return {"seconds": spent, "new_tokens": new, "preemptions": preemptions, "said": zlib.crc32(str(said).encode())}


# -- parts --------------------------------------------------------------------------------------------------------------


def _sampling(new: int) -> Any:
    from outsize.serving import Sampling

    return Sampling(max_new_tokens=new, ignore_end=True)


def decode(engine: Any, prompts: list[list[int]], new: int) -> float:
    """Tokens a second while all of `prompts` decode."""
    from outsize.serve.request import Request

    times: list[list[float]] = [[] for _ in prompts]
    left = threading.Event()

    def listener(number: int) -> Callable[[Any], None]:
        def hear(event: Any) -> None:
            if event.chosen is not None:
                times[number].append(perf_counter())
            if event.finish is not None and all(len(heard) == new for heard in times):
                left.set()

        return hear

    for number, prompt in enumerate(prompts):
        engine.submit(Request(tuple(prompt), _sampling(new), listener(number)))
    left.wait()
    start, end = max(heard[0] for heard in times), min(heard[-1] for heard in times)
    return sum(start < moment <= end for heard in times for moment in heard) / (end - start)


def whole_model(path: str) -> Any:
    """The model as transformers has it, through a folder of files."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from outsize.model.load import open_model

    source = open_model(path)
    with tempfile.TemporaryDirectory() as folder:
        tensors = {name: source.read(name).to(torch.bfloat16).contiguous() for name in source.shapes()}
        save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})
        source.save_companions(folder, torch.bfloat16)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def transformers_decode(model: Any, prompts: Any, new: int) -> float:
    first = seconds(lambda: transformers_generate(model, prompts, 1))
    return len(prompts) * (new - 1) / (seconds(lambda: transformers_generate(model, prompts + 1, new)) - first)


def _read_prompt(model: Any, prompt: Any) -> Any:
    return transformers_generate(model, prompt, 1)


def transformers_generate(model: Any, prompts: Any, new: int, mask: Any = None) -> Any:
    import torch

    mask = torch.ones_like(prompts) if mask is None else mask
    with torch.no_grad():
        return model.generate(
            prompts, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )


def seconds(work: Callable[[], Any]) -> float:
    started = perf_counter()
    work()
    return perf_counter() - started
