"""What lossless packing gains and how fast it is, on the numbers of a real run beside other ways to pack them.

python bench/packing.py RUN --megabytes 64

RUN is a folder of `outsize train`, such as runs/demo. Prints the tables of docs/packing.md."""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import zstandard

from outsize.model.byte_groups import pack, unpack, word_size
from outsize.train.checkpoint import Checkpoint, open_checkpoint
from outsize.train.state import StateFolder

CHUNK = 1 << 20
ROWS = 256
Packer = Callable[[np.ndarray, torch.dtype], list[bytes]]


def whole(coder: Callable[[bytes], bytes], data: np.ndarray, dtype: torch.dtype) -> list[bytes]:
    """The bytes in the order in which they lie."""
    return [coder(data.tobytes())]


def grouped(coder: Callable[[bytes], bytes], data: np.ndarray, dtype: torch.dtype) -> list[bytes]:
    """Bytes of equal significance together, without the rotation that puts the sign elsewhere."""
    groups = data.reshape(-1, word_size(dtype))
    return [coder(np.ascontiguousarray(groups[:, number]).tobytes()) for number in range(groups.shape[1])]


def huffman(data: bytes) -> bytes:
    coder = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()


OTHERS: dict[str, Packer] = {
    "zstd -3, as they lie": partial(whole, zstandard.ZstdCompressor(level=3).compress),
    "zstd -3, grouped": partial(grouped, zstandard.ZstdCompressor(level=3).compress),
    "zstd -1, grouped": partial(grouped, zstandard.ZstdCompressor(level=1).compress),
    "zlib's Huffman, grouped": partial(grouped, huffman),
}


def kinds(checkpoint: Checkpoint, limit: int) -> Iterator[tuple[str, np.ndarray, torch.dtype]]:
    """Up to `limit` bytes of each kind of number, from as many tensors as that takes."""
    weights = [name for name, entry in checkpoint.weights.items() if len(entry.shape) == 2]
    first = next(iter(checkpoint.optimizer.values()))
    yield (
        "weights",
        *_gather((lambda n, a, b: checkpoint.read(checkpoint.weights[n], a, b)), weights, checkpoint, limit),
    )
    yield "masters", *_gather(checkpoint.read_master, weights, checkpoint, limit)
    for key in first.tensors:

        def read(name: str, start: int, stop: int, key: str = key) -> torch.Tensor:
            return checkpoint.read(checkpoint.optimizer[name].tensors[key], start, stop)

        yield key, *_gather(read, weights, checkpoint, limit)
    normal = torch.randn(limit // 2, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    yield "normal distribution", normal.view(torch.uint8).numpy(), torch.bfloat16


def _gather(
    read: Callable[[str, int, int], torch.Tensor], names: list[str], checkpoint: Checkpoint, limit: int
) -> tuple[np.ndarray, torch.dtype]:
    """Some rows of every tensor, so that all layers have their say."""
    share, found = limit // len(names), []
    for name in names:
        rows, columns = checkpoint.weights[name].shape
        found.append(read(name, 0, max(1, min(rows, share // (4 * columns)))).reshape(-1))
    together = torch.cat(found)
    return together.view(torch.uint8).numpy(), together.dtype


def chunks(data: np.ndarray) -> Iterator[np.ndarray]:
    yield from (data[start : start + CHUNK] for start in range(0, len(data), CHUNK))


def timed(data: np.ndarray, dtype: torch.dtype, packer: Packer) -> tuple[float, float, list[list[bytes]]]:
    """Bytes after to bytes before, bytes a second, and what came out; the first chunk warms up."""
    packer(data[:CHUNK], dtype)
    started = perf_counter()
    packed = [packer(chunk, dtype) for chunk in chunks(data)]
    seconds = perf_counter() - started
    return sum(len(group) for groups in packed for group in groups) / len(data), len(data) / seconds, packed


def unpack_speed(data: np.ndarray, dtype: torch.dtype, packed: list[list[bytes]]) -> float:
    """Bytes a second. Raises AssertionError unless every bit comes back."""
    views = [[memoryview(group) for group in groups] for groups in packed]
    counts = [len(chunk) // word_size(dtype) for chunk in chunks(data)]
    started = perf_counter()
    back = [unpack(groups, count, dtype) for groups, count in zip(views, counts, strict=True)]
    seconds = perf_counter() - started
    assert np.array_equal(np.concatenate(back), data), "not every bit came back"
    return len(data) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--megabytes", type=int, default=64, help="of each kind of number")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| | dtype | packed to | pack MB/s | unpack MB/s | {' | '.join(OTHERS)} |")
    print(f"|---|---|---|---|---|{'---|' * len(OTHERS)}")
    with open_checkpoint(StateFolder(arguments.run / "state")) as checkpoint:
        for name, data, dtype in kinds(checkpoint, arguments.megabytes << 20):
            part, speed, packed = timed(data, dtype, pack)
            back = unpack_speed(data, dtype, packed)
            others = [timed(data, dtype, packer)[:2] for packer in OTHERS.values()]
            columns = [f"{ratio:.1%}, {rate / 1e6:.0f} MB/s" for ratio, rate in others]
            cells = [name, str(dtype)[6:], f"**{part:.1%}**", f"{speed / 1e6:.0f}", f"{back / 1e6:.0f}", *columns]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
