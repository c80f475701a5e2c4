"""What training on a device takes beside what a plan places there: of the device, and of its host's memory.

No GPU was at hand: what is called assumed here is not measured."""

from __future__ import annotations

from dataclasses import dataclass

from outsize.machine.allocator import Ceiling

WORKSPACE = 64 << 20  # bytes that products on a device keep for themselves; assumed
LIBRARIES = 1 << 30  # bytes of the host's memory that CUDA's libraries take once a device computes; assumed
HOST_SHARE = 0.9  # of a described node's memory that its workers may use, where nobody says; assumed
BUFFERS = (
    7  # that transfers go through: pinned ones of two readers and a writer, the writer's other one, parts on their way
)
COPIES = 2  # of a matrix, as it comes from a file or goes to one


@dataclass(frozen=True)
class Beside:
    """Bytes of the host's memory by cause, where a device computes; but for what a plan lets live there.

    `moved` are activations that wait there, `updating` the buffers of updates if any are there, `baseline` and `headroom` as
    in `Needs`; a process that is here has CUDA's `libraries` in its baseline."""

    baseline: int
    libraries: int
    moved: int
    scratch: int
    updating: int
    headroom: int = Ceiling.WORTH

    @property
    def fixed(self) -> int:
        return self.baseline + self.libraries + self.moved + self.scratch + self.headroom
