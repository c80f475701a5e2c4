"""How fast a processor computes: the operations of a transformer's training step, timed on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from time import perf_counter

import torch
from torch.nn.functional import linear

from outsize.machine.machine import Processor, Rate, Spread

ROWS = (1, 8, 32, 128, 512, 2048)  # tokens that pass through a weight together, from decoding to training
TOUCHED = (1 << 20, 8 << 20, 64 << 20, 512 << 20)  # bytes of one elementwise operation, from cached to not
COPIED = 256 << 20  # bytes
CHUNK = 1 << 20  # elements; the streamed update steps the optimizer in pieces of this size
COLD = 256 << 20  # bytes that are gone through before one is used again, so that no cache still holds it
OPERATIONS = 1000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Stopwatch:
    """Times work on `device` ("cpu" or "cuda") for about `seconds` a figure, and at least three times."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def times(self, work: Callable[[], object]) -> list[float]:
        """Return the seconds that `work` took on average of a sixteenth of the time, each such time."""
        once = min(self._run(work, 1) for _ in range(2))
        repeats = max(1, int(self.seconds / 16 / once))
        seconds: list[float] = []
        while len(seconds) < 3 or sum(seconds) * repeats < self.seconds:
            seconds.append(self._run(work, repeats) / repeats)
        return seconds

    def rate(self, figure: str, unit: str, amount: float, work: Callable[[], object]) -> Spread:
        """Return what `work`, which does `amount` of something, does in a second."""
        return Spread.of(figure, unit, [amount / seconds for seconds in self.times(work)])

    def _run(self, work: Callable[[], object], repeats: int) -> float:
        started = perf_counter()
        for _ in range(repeats):
            work()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - started


def time_processor(
    watch: Stopwatch, tier: str, room: int, report: Callable[[str], None], rows: tuple[int, ...] = ROWS
) -> list[Spread]:
    """Time `watch.device`, using some `room` bytes of its memory, products of so many `rows`; `report` hears what comes next.

    On a GPU untested: none was at hand."""
    seen: list[Spread] = []
    with torch.no_grad():
        for dtype in _dtypes(watch.device):
            report(f"{tier}: products in {dtype}")
            seen += _products(watch, tier, dtype, 2048 if watch.device == "cpu" else 8192, room, rows)
        report(f"{tier}: memory, optimizer, small operations")
        seen += [_elementwise(watch, tier, size) for size in TOUCHED if size <= max(room, TOUCHED[0])]
        seen += [_copy(watch, tier, min(COPIED, room)), _read(watch, tier, min(COPIED, room))]
        seen += [_update(watch, tier, min(COLD, room)), _operation(watch, tier)]
    return seen


def make_processor(tier: str, name: str, count: int, cores: int, seen: list[Spread]) -> Processor:
    """Return the processor that `time_processor` timed, with the medians as its figures."""
    medians = {one.figure: one.median for one in seen}
    matmul = {dtype: {rows: medians.get(_product(tier, dtype, rows)) for rows in ROWS} for dtype in DTYPES}
    return Processor(
        tier,
        name,
        tuple((dtype, _rate(rates)) for dtype, rates in matmul.items() if rates[ROWS[0]]),
        _rate({size: medians.get(_touching(tier, size)) for size in TOUCHED}),
        medians[f"{tier} copy"],
        medians[f"{tier} fused AdamW"],
        medians[f"{tier} small operation"],
        count,
        cores,
    )


def count_devices() -> int:
    return torch.cuda.device_count()


def _dtypes(device: str) -> list[str]:
    """Those that are worth timing: a CPU has no use for fp16."""
    return [dtype for dtype in DTYPES if device != "cpu" or dtype != "fp16"]


def _product(tier: str, dtype: str, rows: int) -> str:
    return f"{tier} {dtype} matmul {rows} row{'s' if rows > 1 else ''}"


def _touching(tier: str, size: int) -> str:
    return f"{tier} elementwise {size >> 20} MiB"


def _rate(by_size: dict[int, float | None]) -> Rate:
    return Rate(tuple((float(size), rate) for size, rate in by_size.items() if rate is not None))


def probe_links(watch: Stopwatch, room: int) -> list[Spread]:
    """Time copies between pinned host memory and the GPU: up, down, and both at once. Untested: no GPU was at hand."""
    size = min(COPIED, room)
    host = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    device = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def move(up: bool, down: bool) -> None:
        if up:
            with torch.cuda.stream(streams[0]):
                device[0].copy_(host[0], non_blocking=True)
        if down:
            with torch.cuda.stream(streams[1]):
                host[1].copy_(device[1], non_blocking=True)

    found = [
        watch.rate("host to device", "B/s", size, lambda: move(True, False)),
        watch.rate("device to host", "B/s", size, lambda: move(False, True)),
        watch.rate("host and device, both ways", "B/s", 2 * size, lambda: move(True, True)),
    ]
    if torch.cuda.device_count() > 1:
        other = torch.empty(size, dtype=torch.uint8, device="cuda:1")
        found.append(watch.rate("device to device", "B/s", size, lambda: other.copy_(device[0])))
    return found


def _products(
    watch: Stopwatch, tier: str, dtype: str, width: int, room: int, several: tuple[int, ...]
) -> Iterator[Spread]:
    """Products with square weights of `width`, each weight fetched from memory anew, as a layer's are."""
    first = torch.full((width, width), 0.25, dtype=DTYPES[dtype], device=watch.device)
    weights = [first, *(first.clone() for _ in range(max(1, min(COLD, room) // first.nbytes - 1)))]
    for rows in several:
        data = torch.full((rows, width), 0.25, dtype=DTYPES[dtype], device=watch.device)
        turn = cycle(weights)
        work = 2.0 * rows * width * width
        figure = _product(tier, dtype, rows)
        yield watch.rate(figure, "FLOP/s", work, lambda data=data, turn=turn: linear(data, next(turn)))


def _elementwise(watch: Stopwatch, tier: str, touched: int) -> Spread:
    source = torch.ones(touched // 8, device=watch.device)
    target = torch.empty_like(source)
    return watch.rate(_touching(tier, touched), "B/s", touched, lambda: torch.mul(source, 1.5, out=target))


def _copy(watch: Stopwatch, tier: str, size: int) -> Spread:
    source = torch.ones(size // 2, dtype=torch.uint8, device=watch.device)
    target = torch.empty_like(source)
    return watch.rate(f"{tier} copy", "B/s", size // 2, lambda: target.copy_(source))


def _read(watch: Stopwatch, tier: str, size: int) -> Spread:
    source = torch.ones(size // 4, device=watch.device)
    return watch.rate(f"{tier} read", "B/s", size, source.sum)


def _update(watch: Stopwatch, tier: str, room: int) -> Spread:
    """Fused AdamW on fp32, chunk after chunk; master, gradient and moments of each come from memory."""
    chunks = [torch.nn.Parameter(torch.ones(CHUNK, device=watch.device)) for _ in range(max(2, room // (16 * CHUNK)))]
    for chunk in chunks:
        chunk.grad = torch.ones_like(chunk)
    optimizers = [torch.optim.AdamW([chunk], fused=True) for chunk in chunks]
    for optimizer in optimizers:
        optimizer.step()  # makes its state
    turn = cycle(optimizers)
    return watch.rate(f"{tier} fused AdamW", "param/s", CHUNK, lambda: next(turn).step())


def _operation(watch: Stopwatch, tier: str) -> Spread:
    data = torch.ones(16, device=watch.device)

    def work() -> None:
        for _ in range(OPERATIONS):
            torch.add(data, 1.0)

    seconds = [seconds / OPERATIONS for seconds in watch.times(work)]
    return Spread.of(f"{tier} small operation", "s", seconds)
