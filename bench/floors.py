"""What no arrangement can beat: the step's arithmetic with every byte at hand, and its bytes with no arithmetic."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Any

import torch
from shapes import SEQUENCE_LENGTH, SHAPES, Shape, token_ids
from throttle import ThrottledDisk
from torch.utils.checkpoint import checkpoint

from outsize.memory.codec import join_master, split_master
from outsize.memory.disk import DiskTier
from outsize.memory.host import allocate_slab
from outsize.memory.tier import Extent
from outsize.memory.transfer import Ticket, Transfers
from outsize.train.gradients import add_up
from outsize.train.loss import Head, blocked_cross_entropy, next_tokens

CHUNK = 1 << 20  # elements: what arithmetic alone likes best
CHUNKS = 96  # of state in turn, 1.3 GB: more than the caches of any processor, for state always comes from farther away
TABLE_ROWS = 2048  # of the head in one block
PIECE = 12 << 20  # bytes moved at once; a chunk of state has as many
RING = 12  # pieces under way


def compute(shape: str, steps: int, accumulate: int = 1, recompute: bool = True) -> dict[str, Any]:
    """Seconds of a step without I/O: one layer's weights stand for all layers', one block for the whole head. Of several
    micro-batches each adds its gradients to fp32 sums, as in every loop that keeps fp32 masters."""
    sums = Sums() if accumulate > 1 else None
    model = _one_layer_model(SHAPES[shape], recompute, sums.take if sums else _forget)
    update = _update(SHAPES[shape])
    parts: dict[str, list[float]] = {"forward": [], "head": [], "backward": [], "update": []}
    for step in range(steps):
        for name, seconds in _step(model, SHAPES[shape], accumulate, step, sums).items():
            parts[name].append(seconds)
        with _timed(parts["update"]):
            update()
    medians = {f"{name}_seconds": statistics.median(seconds[1:]) for name, seconds in parts.items()}
    return {"seconds": sum(medians.values()), "tokens": accumulate * SEQUENCE_LENGTH, **medians}


def _one_layer_model(shape: Shape, recompute: bool, take: Callable[[torch.Tensor], None]) -> Any:
    from transformers import LlamaForCausalLM

    config = shape.config()
    config.num_hidden_layers = 1
    model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    layers = [_sharing(model.model.layers[0]) for _ in range(shape.layers)]
    for layer in layers if recompute else []:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = shape.layers
    model.get_input_embeddings().weight.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(take)
    return model


def _sharing(layer: torch.nn.Module) -> torch.nn.Module:
    """Another layer with parameters of its own, whose gradients autograd does not add to others', in the same memory."""
    return copy.deepcopy(layer, {id(each): torch.nn.Parameter(each.data) for each in layer.parameters()})


def _forget(parameter: torch.Tensor) -> None:
    parameter.grad = None


class Sums:
    """Gradients of several micro-batches, added up in fp32: the first one's are copied. What shares its memory with others
    shares its sum."""

    def __init__(self) -> None:
        self.first = True
        self._sums: dict[Any, torch.Tensor] = {}

    def take(self, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        self.add(parameter.data_ptr(), gradient)

    def add(self, what: Any, gradient: torch.Tensor) -> None:
        if what not in self._sums:
            self._sums[what] = torch.empty_like(gradient, dtype=torch.float32)
        if self.first:
            self._sums[what].copy_(gradient)
        else:
            add_up(self._sums[what], gradient)


def _step(model: Any, shape: Shape, accumulate: int, step: int, sums: Sums | None = None) -> dict[str, float]:
    seconds = {"forward": 0.0, "head": 0.0, "backward": 0.0}
    ids = token_ids(shape.vocabulary)
    for lane in range(accumulate):
        if sums is not None:
            sums.first = lane == 0
        start = (step * accumulate + lane) * SEQUENCE_LENGTH
        batch = torch.tensor(ids[start : start + SEQUENCE_LENGTH])[None]
        embedded = model.get_input_embeddings()(batch).requires_grad_()
        started = perf_counter()
        hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        forward = perf_counter()
        picked, targets, where = next_tokens(hidden.detach(), batch)
        _, gradients = blocked_cross_entropy([picked], [targets], _head(model, shape, sums))
        head = perf_counter()
        full = torch.zeros_like(hidden)
        full.view(-1, full.shape[-1])[where] = gradients[0]
        hidden.backward(full)
        seconds["forward"] += forward - started
        seconds["head"] += head - forward
        seconds["backward"] += perf_counter() - head
    return seconds


def _head(model: Any, shape: Shape, sums: Sums | None) -> Head:
    table = model.get_input_embeddings().weight.detach()
    blocks = [(start, min(start + TABLE_ROWS, shape.vocabulary)) for start in range(0, shape.vocabulary, TABLE_ROWS)]

    @contextmanager
    def weight(rows: tuple[int, int]) -> Iterator[torch.Tensor]:
        yield table[rows[0] : rows[1]]

    def take(rows: tuple[int, int], lane: int, gradient: torch.Tensor) -> None:
        if sums is not None:
            sums.add(gradient.shape, gradient)

    return Head(blocks, weight, take)


def _update(shape: Shape) -> Callable[[], None]:
    """Fused AdamW on split masters, as many chunks as the model has."""
    high = [torch.zeros(CHUNK, dtype=torch.bfloat16) for _ in range(CHUNKS)]
    low = [torch.zeros(CHUNK, dtype=torch.int16) for _ in range(CHUNKS)]
    moments = [[torch.zeros(CHUNK), torch.zeros(CHUNK)] for _ in range(CHUNKS)]
    gradients = [torch.full((CHUNK,), 1e-3, dtype=torch.bfloat16) for _ in range(CHUNKS)]
    master, gradient = torch.nn.Parameter(torch.zeros(CHUNK)), torch.zeros(CHUNK)
    optimizer = torch.optim.AdamW([master], lr=1e-5, fused=True)
    count = -(-shape.parameters // CHUNK)

    def run() -> None:
        for chunk in (index % CHUNKS for index in range(count)):
            join_master(high[chunk], low[chunk], master.data, gradient)
            master.grad = gradient.copy_(gradients[chunk])
            state = {"step": torch.tensor(1.0), "exp_avg": moments[chunk][0], "exp_avg_sq": moments[chunk][1]}
            optimizer.state[master] = state
            optimizer.step()
            split_master(master.data, high[chunk], low[chunk])

    return run


@contextmanager
def _timed(into: list[float]) -> Iterator[None]:
    started = perf_counter()
    yield
    into.append(perf_counter() - started)


def disk(place: str, read: int, written: int, steps: int, throttled: bool = False) -> dict[str, Any]:
    """Seconds to move a step's bytes with no arithmetic."""
    seconds: list[float] = []
    with _traffic(place, read, written, throttled) as move:
        for step in range(steps):
            with _timed(seconds):
                move(step)
    return {"seconds": statistics.median(seconds), "bytes_read": read, "bytes_written": written}


def together(
    place: str, shape: str, read: int, written: int, steps: int, throttled: bool = False, accumulate: int = 1
) -> dict[str, Any]:
    """Seconds until a step's arithmetic and its bytes are done, begun at once and knowing nothing of each other: what one
    costs the other on this machine, processors and memory being the same, where nothing ever waits."""
    sums = Sums() if accumulate > 1 else None
    model, update = _one_layer_model(SHAPES[shape], True, sums.take if sums else _forget), _update(SHAPES[shape])
    seconds: list[float] = []
    updating: list[float] = []
    with _traffic(place, read, written, throttled) as move:
        for step in range(steps):
            with _timed(seconds):
                thread = Thread(target=move, args=(step,))
                thread.start()
                _step(model, SHAPES[shape], accumulate, step, sums)
                with _timed(updating):
                    update()
                thread.join()
    return {
        "seconds": statistics.median(seconds[1:]),
        "update_seconds": statistics.median(updating[1:]),
        "tokens": accumulate * SEQUENCE_LENGTH,
        "bytes_read": read,
        "bytes_written": written,
    }


@contextmanager
def _traffic(place: str, read: int, written: int, throttled: bool) -> Iterator[Callable[[int], None]]:
    """What moves a step's bytes as a step does: what is only read first, then reads and writes mixed. A step reads one copy
    and writes the other, as blocks alternate between two extents."""
    path = Path(place) / "floor"
    path.unlink(missing_ok=True)
    try:
        pipe = Pipe(path, throttled)
        mixed, alone = written // PIECE, max(read - written, 0) // PIECE
        copies = [[pipe.tier.allocate(PIECE) for _ in range(mixed)] for _ in range(2)]
        for extent in (*copies[0], *copies[1]):  # an extent that was never written would be read for nothing
            pipe.move(None, extent)
        pipe.settle()

        def move(step: int) -> None:
            source, target = copies[step % 2], copies[1 - step % 2]
            for index in range(alone):
                pipe.move(source[index % mixed], None)
            for index in range(mixed):
                pipe.move(source[index], target[index])
            pipe.settle()

        yield move
        pipe.close()
    finally:
        path.unlink(missing_ok=True)


class Pipe:
    """A ring of buffers between extents of a file."""

    def __init__(self, path: Path, throttled: bool) -> None:
        self.tier: DiskTier = DiskTier(path)
        if throttled:
            self.tier = ThrottledDisk(self.tier)
        self._transfers = Transfers()
        self._ring = [allocate_slab(PIECE) for _ in range(RING)]
        for buffer in self._ring:
            buffer.random_()
        self._busy: list[Ticket | None] = [None] * RING
        self._moved = 0

    def move(self, source: Extent | None, target: Extent | None) -> None:
        """Read a piece, if there is a source, then write it, if there is a target, when a buffer is free."""
        place = self._moved % RING
        self._moved += 1
        self._wait(place)
        buffer = self._ring[place]
        through = self._busy[place] = Ticket()

        def pass_on(error: BaseException | None) -> None:
            if error is not None or target is None:
                through.piece_done(error)
            else:
                self._transfers.write(self.tier, target, 0, buffer, then=through.piece_done)

        if source is None:
            pass_on(None)
        else:
            self._transfers.read(self.tier, source, 0, buffer, then=pass_on)

    def _wait(self, place: int) -> None:
        ticket = self._busy[place]
        if ticket is not None:
            ticket.wait()

    def settle(self) -> None:
        """Wait for all pieces, and until they are durable."""
        for place in range(RING):
            self._wait(place)
        self.tier.flush()

    def close(self) -> None:
        self._transfers.close()
        self.tier.close()
