"""From tokens to batches: packed into sequences in a file, read in a seeded order.

The tokens live in one .npy file in the run's folder and are read a sequence at a time with `os.pread`, so the
data holds next to nothing of a memory budget: 16 bytes a token of a batch (ids and labels, int64 each) and
about 4 bytes a token of one sequence.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count as count_from
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
import xxhash

from outsize.errors import DataError, OptionError, StorageError
from outsize.train.documents import read_documents
from outsize.train.tokens import Tokens, tokenize

NOT_LEARNT = -100
"""The label that cross entropy passes over, in torch and in transformers."""
ROUNDS = 6
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PackedDataset:
    """Sequences of equal length in a file; holds an open file and no tokens."""

    path: Path
    count: int
    sequence_length: int
    record: numpy.dtype
    offset: int
    descriptor: int

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "PackedDataset":
        """Opens a file written by `pack`. Raises DataError when it is missing, of another kind or cut off."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                version = numpy.lib.format.read_magic(file)
                if version != (1, 0):
                    raise ValueError(f"a version {version} header")
                (count,), _, record = numpy.lib.format.read_array_header_1_0(file)
                sequence_length, offset = record["tokens"].shape[0], file.tell()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError) as error:
            raise DataError(f"{path} does not hold packed tokens: {error}; prepare the data again") from error
        expected, size = offset + count * record.itemsize, path.stat().st_size
        if size != expected:
            raise DataError(f"{path} has {size} bytes where {count} sequences take {expected}; prepare the data again")
        return cls(path, count, sequence_length, record, offset, os.open(path, os.O_RDONLY))

    def sequence(self, index: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Ids [tokens] uint32 and learnt [tokens] bool of one sequence, read from the file."""
        raw = os.pread(self.descriptor, self.record.itemsize, self.offset + index * self.record.itemsize)
        if len(raw) != self.record.itemsize:
            raise DataError(f"{self.path} ends within sequence {index}; prepare the data again")
        record = numpy.frombuffer(raw, self.record)[0]
        return record["tokens"], numpy.unpackbits(record["learnt"], count=self.sequence_length).view(bool)

    def batch(self, indices: Sequence[int]) -> Batch:
        """`input_ids` and `labels`, each [batch, tokens] int64; a label is -100 where nothing is learnt.

        Labels are not shifted: the loss does that, as in transformers.
        """
        shape = (len(indices), self.sequence_length)
        input_ids, labels = numpy.empty(shape, numpy.int64), numpy.empty(shape, numpy.int64)
        for row, index in enumerate(indices):
            tokens, learnt = self.sequence(index)
            input_ids[row] = tokens
            labels[row] = numpy.where(learnt, input_ids[row], NOT_LEARNT)
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}

    def digest(self) -> str:
        """Of all its bytes: 16 hexadecimal digits."""
        found = xxhash.xxh3_64()
        with self.path.open("rb") as file:
            while piece := file.read(1 << 20):
                found.update(piece)
        return found.hexdigest()

    def close(self) -> None:
        os.close(self.descriptor)


def prepare(
    source: str | os.PathLike[str], tokenizer: Any, sequence_length: int, path: str | os.PathLike[str]
) -> PackedDataset:
    """Reads a file or folder of text, tokenizes and packs it into `path`, one piece at a time.

    Raises DataError as `read_documents`, `tokenize` and `pack` do.
    """
    return pack(tokenize(read_documents(source), tokenizer), path, sequence_length, tokenizer.eos_token_id)


def pack(tokens: Iterable[Tokens], path: str | os.PathLike[str], sequence_length: int, padding: int) -> PackedDataset:
    """Writes `tokens` end to end as sequences of `sequence_length` to the .npy file `path` and opens it.

    The last sequence is filled up with the token `padding`, not to be learnt: a data set smaller than a
    sequence is one sequence. A sequence with nothing to learn in it is left out, as its mean loss would be
    0 / 0. The file appears under its name when it is complete and durable.

    Raises DataError when nothing is left, StorageError when the disk refuses, OptionError for a length
    under 2 (the loss predicts the next token).
    """
    path = Path(path)
    if sequence_length < 2:
        raise OptionError(f"sequence length {sequence_length} leaves no next token to predict; give 2 or more")
    record = numpy.dtype([("tokens", "<u4", (sequence_length,)), ("learnt", "u1", (-(-sequence_length // 8),))])
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            count = _write(file, record, _sequences(tokens, sequence_length, padding))
        if not count:
            raise DataError(
                f"the data has nothing to learn in any sequence of {sequence_length} tokens; "
                "give more text, or longer sequences where prompts are long"
            )
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}; free space or choose another") from error
    finally:
        partial.unlink(missing_ok=True)
    return PackedDataset.open(path)


def _write(file: BinaryIO, record: numpy.dtype, sequences: Iterable[tuple[numpy.ndarray, numpy.ndarray]]) -> int:
    """The number of sequences written; the header is written again when that is known."""

    def header(count: int) -> None:
        shape = {"descr": record.descr, "fortran_order": False, "shape": (count,)}
        numpy.lib.format.write_array_header_1_0(file, shape)

    header(0)
    written = 0
    for ids, learnt in sequences:
        file.write(ids.tobytes())
        file.write(numpy.packbits(learnt).tobytes())
        written += 1
    file.seek(0)
    header(written)  # numpy pads the header so that the count may grow in place
    file.flush()
    os.fsync(file.fileno())
    return written


def _sequences(
    tokens: Iterable[Tokens], sequence_length: int, padding: int
) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
    """Ids [tokens] and learnt [tokens] of each sequence, in two arrays that are used again for the next.

    The first token of a sequence is never predicted, so it does not count as something to learn.
    """
    ids, learnt = numpy.empty(sequence_length, "<u4"), numpy.empty(sequence_length, bool)
    filled = 0
    for run in tokens:
        taken = 0
        while taken < len(run.ids):
            size = min(sequence_length - filled, len(run.ids) - taken)
            ids[filled : filled + size] = run.ids[taken : taken + size]
            learnt[filled : filled + size] = run.learnt[taken : taken + size]
            filled, taken = filled + size, taken + size
            if filled == sequence_length:
                if learnt[1:].any():
                    yield ids, learnt
                filled = 0
    ids[filled:], learnt[filled:] = padding, False
    if filled and learnt[1:].any():
        yield ids, learnt


def batches(
    dataset: PackedDataset,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    accumulate: int = 1,
    mine: range | None = None,
) -> Iterator[list[Batch]]:
    """For each step from `start_step` on, without end: `accumulate` micro-batches of `batch_size` sequences. Of several
    workers each gets its run of the step's sequences, `mine`, in as many micro-batches as that takes.

    Every epoch is another permutation, given by (seed, epoch) alone; a step that reaches the end of an epoch
    goes on into the next, so a data set smaller than a batch repeats within it. What a step reads is a pure
    function of its number: starting late replays nothing. `input_ids` and `labels` are as in
    `PackedDataset.batch`. Raises OptionError for sizes under 1 and a step under 0.
    """
    if min(batch_size, accumulate) < 1 or start_step < 0:
        raise OptionError(f"batch size {batch_size}, accumulation {accumulate}, start step {start_step}: too small")
    size = batch_size * accumulate
    mine = range(size) if mine is None else mine
    for step in count_from(start_step):
        order = [index_at(step * size + number, dataset.count, seed) for number in mine]
        yield [dataset.batch(order[first : first + batch_size]) for first in range(0, len(order), batch_size)]


def in_order(dataset: PackedDataset, batch_size: int) -> Iterator[Batch]:
    """Every sequence once, in the order of the file, for evaluation; the last batch may be smaller."""
    for start in range(0, dataset.count, batch_size):
        yield dataset.batch(range(start, min(start + batch_size, dataset.count)))


def index_at(position: int, count: int, seed: int) -> int:
    """Which of `count` sequences stands at `position` of the endless order that `seed` gives.

    A Feistel network permutes the smallest square of a power of two that holds `count` numbers; a result
    outside of them is permuted again until it falls inside (Black and Rogaway, Ciphers with Arbitrary Finite
    Domains, CT-RSA 2002). So there is no table of the order, and no version of a library can change it.
    """
    epoch, index = divmod(position, count)
    half = ((count - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        for turn in range(ROUNDS):
            left, right = index >> half, index & mask
            index = right << half | (left ^ _mix(seed, epoch, turn, right) & mask)
        if index < count:
            return index


def _mix(*numbers: int) -> int:
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
