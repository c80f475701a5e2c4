"""One contract for every tier, and what only some of them promise."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from outsize.errors import BudgetError, OptionError, StorageError
from outsize.memory.device import DeviceTier
from outsize.memory.disk import BOUNCE, DiskTier
from outsize.memory.host import HostTier, allocate_slab
from outsize.memory.null import NullTier
from outsize.memory.tier import PAGE, Extent, ExtentAllocator, Tier, pages

CAPACITY = 16 * PAGE
SHARED_MEMORY = Path("/dev/shm")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_shared_memory = pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no tmpfs")
KEEPING = [  # tiers that give back what was stored
    "host",
    "disk",
    pytest.param("disk in memory", marks=needs_shared_memory),
    pytest.param("pinned", marks=needs_gpu),
    pytest.param("device", marks=needs_gpu),
]


@contextmanager
def opened(kind: str) -> Iterator[Tier]:
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if kind == "disk in memory" else None) as directory:
        tier = make(kind, Path(directory))
        try:
            yield tier
        finally:
            tier.close()


def make(kind: str, directory: Path) -> Tier:
    if kind.startswith("disk"):
        return DiskTier(directory / "blocks", CAPACITY)
    if kind == "device":
        return DeviceTier(CAPACITY, torch.device("cuda", 0))
    return NullTier("null", CAPACITY) if kind == "null" else HostTier(CAPACITY, pinned=kind == "pinned")


def noise(nbytes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def first_fit(held: dict[Extent, torch.Tensor], nbytes: int) -> Extent | None:
    """Where an allocator that does it the slow way would put `nbytes`, in whole pages."""
    for start in range(0, CAPACITY - nbytes + 1, PAGE):
        if all(start + nbytes <= extent.start or extent.end <= start for extent in held):
            return Extent(start, nbytes)
    return None


operations = st.lists(
    st.tuples(
        st.sampled_from(["allocate", "free", "write", "write", "read"]),
        st.integers(0, 100),  # which extent
        st.one_of(st.just(0), st.integers(0, 5 * PAGE)),  # where in it
        st.one_of(st.just(PAGE), st.integers(1, 5 * PAGE)),  # how many bytes
        st.sampled_from([0, 1, 64, PAGE]),  # how far from a page the memory begins
    ),
    max_size=25,
)


@pytest.mark.parametrize("kind", KEEPING)
@given(operations=operations)
@settings(max_examples=60, deadline=None)
def test_contract_gives_back_what_was_stored(kind: str, operations: list[tuple[str, int, int, int, int]]) -> None:
    memory = allocate_slab(7 * PAGE)
    held: dict[Extent, torch.Tensor] = {}
    with opened(kind) as tier:
        for seed, (verb, which, offset, nbytes, lead) in enumerate(operations):
            if verb == "allocate":
                allocate(tier, held, nbytes, seed)
            elif held:
                extent = sorted(held)[which % len(held)]
                offset = min(offset, extent.nbytes)
                span = slice(offset, min(offset + nbytes, extent.nbytes))
                move(tier, held, extent, verb, span, memory[lead:], seed)
            tier.check()
            assert tier.used == sum(extent.nbytes for extent in held)
        tier.flush()
        for extent, content in held.items():
            move(tier, held, extent, "read", slice(0, content.numel()), memory, 0)


def allocate(tier: Tier, held: dict[Extent, torch.Tensor], nbytes: int, seed: int) -> None:
    expected = first_fit(held, pages(nbytes))
    if expected is None:
        with pytest.raises(StorageError, match="full"):
            tier.allocate(nbytes)
        return
    assert tier.allocate(nbytes) == expected
    held[expected] = noise(expected.nbytes, seed)
    tier.write(expected, 0, held[expected])


def move(
    tier: Tier,
    held: dict[Extent, torch.Tensor],
    extent: Extent,
    verb: str,
    span: slice,
    memory: torch.Tensor,
    seed: int,
) -> None:
    nbytes = span.stop - span.start
    if verb == "free":
        tier.free(extent)
        del held[extent]
    elif verb == "write":
        memory[:nbytes] = held[extent][span] = noise(nbytes, seed)
        tier.write(extent, span.start, memory[:nbytes])
    else:
        memory[: nbytes + 1] = 170
        tier.read(extent, span.start, memory[:nbytes])
        assert torch.equal(memory[:nbytes], held[extent][span])
        assert memory[nbytes] == 170, "bytes behind the target were touched"


@pytest.mark.parametrize("kind", KEEPING)
def test_contract_threads_may_use_different_extents_at_once(kind: str) -> None:
    with opened(kind) as tier:
        extents = [tier.allocate(3 * PAGE) for _ in range(4)]

        def work(number: int) -> None:
            for turn in range(30):
                data, back = noise(2 * PAGE + turn, 100 * number + turn), torch.zeros(2 * PAGE + turn).byte()
                tier.write(extents[number], turn, data)
                tier.read(extents[number], turn, back)
                assert torch.equal(data, back)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(4)))


@pytest.mark.parametrize("kind", [*KEEPING, "null"])
def test_contract_refusals(kind: str) -> None:
    with opened(kind) as tier:
        extent = tier.allocate(10)
        assert extent == Extent(0, PAGE) and tier.capacity == CAPACITY
        with pytest.raises(StorageError, match=r"64\.00 KiB asked, 4\.00 KiB of 64\.00 KiB in use"):
            tier.allocate(CAPACITY)
        data = torch.zeros(PAGE, dtype=torch.uint8)
        for move in (tier.read, tier.write):
            with pytest.raises(ValueError, match="outside"):
                move(extent, 1, data)
            with pytest.raises(ValueError, match="outside"):
                move(extent, -1, data[:1])
            with pytest.raises(ValueError, match="contiguous"):
                move(extent, 0, data[::2])
            with pytest.raises(ValueError, match="contiguous"):
                move(extent, 0, data.view(torch.int16))
        tier.free(extent)
        for late in (tier.free, lambda extent: tier.read(extent, 0, data)):
            with pytest.raises(ValueError, match="not allocated"):
                late(extent)
        assert tier.used == 0
        tier.check()


@pytest.mark.parametrize("kind", ["host", "null"])
def test_contract_claims(kind: str) -> None:
    with opened(kind) as tier:
        tier.claim(Extent(4 * PAGE, 2 * PAGE))
        refused = "3+2 5+1 5+9 4+2 0+16 15+2 16+1 -1+1 1+0"  # first page and count
        spans = [[int(number) * PAGE for number in span.split("+")] for span in refused.split()]
        for start, nbytes in [*spans, (PAGE // 2, PAGE), (0, PAGE // 2)]:
            with pytest.raises(StorageError, match="not whole free pages"):
                tier.claim(Extent(start, nbytes))
        assert tier.allocate(5 * PAGE) == Extent(6 * PAGE, 5 * PAGE)
        tier.check()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20), st.integers(1, 6)), max_size=40))
def test_an_allocator_claims_and_frees_like_a_set_of_pages(steps: list[tuple[bool, int, int]]) -> None:
    allocator = ExtentAllocator("any", CAPACITY + 100)
    free, taken = set(range(16)), []
    for claims, number, count in steps:
        wanted = set(range(number, number + count))
        if claims and wanted <= free:
            taken.append(Extent(number * PAGE, count * PAGE))
            allocator.claim(taken[-1])
            free -= wanted
        elif claims:
            with pytest.raises(StorageError):
                allocator.claim(Extent(number * PAGE, count * PAGE))
        elif taken:
            extent = taken.pop(number % len(taken))
            allocator.free(extent)
            free |= set(range(extent.start // PAGE, extent.end // PAGE))
        allocator.check()
        assert allocator.used == (16 - len(free)) * PAGE


def test_an_empty_block_has_a_place_of_its_own() -> None:
    with opened("host") as tier:
        assert tier.allocate(0) != tier.allocate(0)


# -- null --------------------------------------------------------------------------------------------------


def test_null_takes_tensors_without_bytes_and_leaves_targets_alone() -> None:
    with opened("null") as tier:
        extent = tier.allocate(PAGE)
        with FakeTensorMode():
            fake = torch.zeros(PAGE, dtype=torch.uint8)
        real = torch.full((PAGE,), 7, dtype=torch.uint8)
        for data in (fake, real, torch.empty(PAGE, dtype=torch.uint8, device="meta")):
            tier.write(extent, 0, data)
            tier.read(extent, 0, data)
        assert bool((real == 7).all())


# -- host --------------------------------------------------------------------------------------------------


def own_memory() -> int:
    """Bytes of private, anonymous memory: what is shared or cache does not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_host_memory_goes_back_to_the_operating_system() -> None:
    size = 96 << 20
    tier = HostTier(size)
    tier.write(tier.allocate(PAGE), 0, torch.ones(PAGE, dtype=torch.uint8))  # loads what a copy needs
    tier.free(Extent(0, PAGE))
    source = torch.ones(size // 2, dtype=torch.uint8)  # which the C library may keep, once it goes
    before = own_memory()
    extent = tier.allocate(size)
    tier.write(extent, 0, source)
    assert own_memory() - before > size * 0.45
    tier.free(extent)
    assert own_memory() - before < size * 0.05


def test_a_slab_lives_as_long_as_a_view_of_it() -> None:
    view = allocate_slab(2 * PAGE)[PAGE : PAGE + 3]
    assert view.data_ptr() % PAGE == 0 and view.tolist() == [0, 0, 0]
    view.fill_(9)
    assert view.tolist() == [9, 9, 9]
    assert allocate_slab(0).numel() == 0 and allocate_slab(1).numel() == PAGE


@pytest.mark.parametrize("nbytes", [1 << 60, 1 << 80])
def test_more_memory_than_there_can_be_is_refused_with_the_number(nbytes: int) -> None:
    with pytest.raises(BudgetError, match="TiB"):
        allocate_slab(nbytes)


# -- disk --------------------------------------------------------------------------------------------------


def test_a_disk_tier_opens_what_it_left(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "new" / "blocks")
    assert tier.capacity > PAGE and tier.capacity % PAGE == 0
    one, two = tier.allocate(2 * PAGE), tier.allocate(3 * PAGE)
    tier.write(two, 0, noise(3 * PAGE, 1))
    tier.flush()
    tier.close()
    tier.close()
    assert (tmp_path / "new" / "blocks").stat().st_mode & 0o777 == 0o600

    again = DiskTier(tmp_path / "new" / "blocks")
    again.claim(two)
    back = torch.zeros(3 * PAGE, dtype=torch.uint8)
    again.read(two, 0, back)
    assert torch.equal(back, noise(3 * PAGE, 1))
    assert again.allocate(PAGE).start == one.start
    again.check()
    again.close()


def test_a_file_cut_short_is_not_read_as_zeros(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "blocks", CAPACITY)
    extent = tier.allocate(4 * PAGE)
    tier.write(extent, 0, noise(4 * PAGE, 1))
    os.truncate(tmp_path / "blocks", 2 * PAGE + 100)
    for target in (allocate_slab(4 * PAGE), torch.zeros(4 * PAGE - 3, dtype=torch.uint8)):
        with pytest.raises(StorageError, match="blocks ends at byte .* cut short"):
            tier.read(extent, 0, target)
    tier.close()
    again = DiskTier(tmp_path / "blocks", CAPACITY)
    with pytest.raises(StorageError, match=f"ends at byte {2 * PAGE + 100}"):
        again.claim(extent)
    assert again.used == 0
    again.close()


def test_a_full_disk_shows_at_once_and_takes_nothing(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "blocks", 1 << 60)
    tier.allocate(PAGE)
    with pytest.raises(StorageError, match=r"disk of .*blocks is full: 8192.00 TiB wanted, .* free\. Free space"):
        tier.allocate(1 << 53)
    assert (tmp_path / "blocks").stat().st_size == tier.used == PAGE
    assert tier.allocate(PAGE) == Extent(PAGE, PAGE)
    tier.close()


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """The operating system fails what would make a file longer; a Python process ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_the_operating_system_refuses_is_told(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "blocks", CAPACITY)
    extent = tier.allocate(8 * PAGE)
    with largest_file(4 * PAGE):
        with pytest.raises(StorageError, match=r"Could not write 32\.00 KiB of .*blocks .*free on its disk"):
            tier.write(extent, 0, allocate_slab(8 * PAGE))
        with pytest.raises(StorageError, match=r"Could not reserve 16\.00 KiB"):
            tier.allocate(4 * PAGE)
    assert (tmp_path / "blocks").stat().st_size == tier.used == 8 * PAGE
    tier.check()
    tier.close()


def test_a_place_where_no_file_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "blocks"):
        with pytest.raises(StorageError, match="cannot be written"):
            DiskTier(path)


def test_nothing_stays_in_the_page_cache(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "blocks", CAPACITY)
    if not tier.direct or sys.platform != "linux":
        pytest.skip("this file system has no O_DIRECT")
    extent = tier.allocate(8 * PAGE)
    for data in (allocate_slab(8 * PAGE), noise(8 * PAGE - 9, 1)):
        tier.write(extent, 0, data)
        tier.read(extent, 0, data)
    assert pages_cached(tmp_path / "blocks") == 0
    with open(tmp_path / "blocks", "rb") as file:
        file.read()
    assert pages_cached(tmp_path / "blocks") == 8, "this is how it looks when the cache was used"
    tier.close()


def pages_cached(path: Path) -> int:
    """How many pages of a file the kernel holds in memory; asking brings none there."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        address = ctypes.c_char.from_buffer(memory)
        flags = (ctypes.c_ubyte * (len(memory) // PAGE))()
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        assert mincore(ctypes.c_void_p(ctypes.addressof(address)), ctypes.c_size_t(len(memory)), flags) == 0
        del address
        return sum(flag & 1 for flag in flags)


def test_open_files_and_threads_memory_go_with_the_tier(tmp_path: Path) -> None:
    def work() -> None:
        tier = DiskTier(tmp_path / "blocks", CAPACITY)
        extent = tier.allocate(PAGE)
        with ThreadPoolExecutor(2) as threads:  # unaligned, so that each thread needs a buffer of its own
            list(threads.map(lambda part: tier.write(extent, part, noise(9, part)), (1, 2)))
        tier.close()

    work()
    files, memory = len(os.listdir("/proc/self/fd")), own_memory()
    for _ in range(20):
        work()
    assert len(os.listdir("/proc/self/fd")) == files
    assert own_memory() - memory < 10 * BOUNCE, "20 times 2 buffers would be 40"


IN_NAMESPACE = ["unshare", "--map-root-user", "--mount", "sh", "-c"]  # whose mounts vanish with the process


def can_mount(directory: Path) -> bool:
    try:
        command = [*IN_NAMESPACE, 'mount -t ramfs none "$0"', str(directory)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def test_a_file_system_without_direct_access_keeps_the_contract(tmp_path: Path) -> None:
    # ramfs has neither O_DIRECT nor fallocate; nothing else that is everywhere refuses O_DIRECT.
    if not can_mount(tmp_path):
        pytest.skip("mounting ramfs is not allowed here")
    program = (
        "import pathlib, sys, warnings, outsize.memory.disk as disk\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    tier = disk.DiskTier(pathlib.Path(sys.argv[1]) / 'blocks')\n"
        "assert not tier.direct and len(said) == 1 and 'no O_DIRECT' in str(said[0].message), said\n"
    )
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "contract and disk and not file",
    ]
    script = 'mount -t ramfs none "$0" && export TMPDIR="$0" && "$1" -c "$2" "$0" && shift 2 && exec "$@"'
    command = [*IN_NAMESPACE, script, str(tmp_path), sys.executable, program, *tests]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


FILLS_UP = """
import os, pathlib, sys, warnings
from outsize.errors import StorageError
from outsize.memory.disk import DiskTier
from outsize.memory.host import allocate_slab
from outsize.memory.tier import PAGE

warnings.simplefilter("ignore")
here = pathlib.Path(sys.argv[1])
tier = DiskTier(here / "blocks")
assert tier.capacity <= 64 * PAGE, "all that is free"

def refusal(act):
    try:
        act()
    except StorageError as problem:
        return str(problem)

kept, late = tier.allocate(8 * PAGE), tier.allocate(8 * PAGE)
tier.write(kept, 0, allocate_slab(8 * PAGE).fill_(7))
os.truncate(tier.path, late.start)  # as on a file system that cannot reserve: the space is missed only when
os.truncate(tier.path, late.end)  # it is written
filler = open(here / "filler", "wb", buffering=0)
try:
    while True:
        filler.write(bytes(PAGE))
except OSError:
    pass

for act in (lambda: tier.write(late, 0, allocate_slab(8 * PAGE).fill_(9)), lambda: tier.allocate(PAGE)):
    said = refusal(act)
    assert said and "blocks is full" in said and "0 B free. Free space and start again" in said, said
back = allocate_slab(8 * PAGE)
tier.read(kept, 0, back)
assert bool((back == 7).all())
tier.check()
os.truncate(here / "filler", 0)
tier.write(late, 0, allocate_slab(8 * PAGE).fill_(9))
tier.read(late, 0, back)
assert bool((back == 9).all())
filler.close()
tier.close()
"""
READ_ONLY = """
import pathlib, sys
from outsize.errors import StorageError
from outsize.memory.disk import DiskTier

for path in ("blocks", "new/blocks"):
    try:
        DiskTier(pathlib.Path(sys.argv[1]) / path)
    except StorageError as problem:
        assert "cannot be written: Read-only file system. Choose a directory" in str(problem), problem
    else:
        raise AssertionError("a read-only disk was opened")
"""


def test_a_disk_that_fills_up_and_one_that_cannot_be_written(tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("mounting tmpfs is not allowed here")
    script = (
        'mount -t tmpfs -o size=256k none "$0" && "$1" -c "$2" "$0" && '
        'mount -o remount,ro none "$0" && "$1" -c "$3" "$0"'
    )
    command = [*IN_NAMESPACE, script, str(tmp_path), sys.executable, FILLS_UP, READ_ONLY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# -- device ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_device_tier() -> None:
    with pytest.raises(OptionError, match="finds no CUDA GPU"):
        DeviceTier(CAPACITY, torch.device("cuda", 0))
