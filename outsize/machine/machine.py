"""A machine as one frozen value: where bytes can live, how fast they move, how fast it computes. All bytes, seconds and
FLOP/s; a node of several devices is described once, and the machine says how many nodes there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log
from statistics import median
from typing import TypeVar

from outsize.errors import OptionError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Rate:
    """Work per second, by the size of one piece of work: `points` are (size, rate) in rising order of size.

    Between two sizes the rate is interpolated on logarithmic axes; outside them it is that of the nearest. One point
    says that the size does not matter."""

    points: tuple[tuple[float, float], ...]

    def at(self, size: float) -> float:
        """Return work per second when a piece of work has this size."""
        smaller = [point for point in self.points if point[0] <= size]
        larger = [point for point in self.points if point[0] > size]
        if not smaller or not larger:
            return smaller[-1][1] if smaller else larger[0][1]
        (low, slow), (high, fast) = smaller[-1], larger[0]
        return slow * (fast / slow) ** (log(size / low) / log(high / low))

    @property
    def best(self) -> float:
        return max(rate for _, rate in self.points)


def steady(rate: float) -> Rate:
    """Return a rate that is the same for every size."""
    return Rate(((1.0, rate),))


@dataclass(frozen=True)
class Capacity:
    """Bytes that exist in a tier of one node. Those of `device` are of each device; all others are shared by the node."""

    tier: str
    nbytes: int


@dataclass(frozen=True)
class Link:
    """A way for bytes from one tier to another, in this direction; `source` and `target` are names of tiers.

    A link that touches `device` exists once for each device, and one from `device` to `device` joins two of them.
    `latency` is what a transfer costs however small it is. Links with the same `shared` also share that limit.
    `bytes_per_core_second` is what one core brings on its way in a second of its time: what transfers take of the host's
    processors, checksums included; None: nothing."""

    source: str
    target: str
    bytes_per_second: float
    latency: float = 0.0
    shared: str | None = None
    bytes_per_core_second: float | None = None


@dataclass(frozen=True)
class Limit:
    """Bytes a second that the links of one node that name this limit move together when more than one of them is busy: a
    disk that reads and writes at once. A link that is busy alone has its own rate, which may be higher or lower."""

    name: str
    bytes_per_second: float


@dataclass(frozen=True)
class Processor:
    """Something that computes on the bytes of one tier: a CPU in `host`, a GPU in `device`. Rates are of one of `count`.

    `matmul` gives attainable (not the vendor's peak) FLOP/s for each dtype ("fp32", "bf16", "fp16") by the rows of the
    left matrix, 2 FLOP for each multiply-add. `elementwise` gives bytes read plus written a second by the bytes that one
    operation touches: what stays in a cache is faster. `copy` is bytes a second of a plain large copy, each byte counted
    once. `update` is parameters a second of a fused AdamW step on fp32 master, gradient and two moments, in chunks as
    the streamed update takes them. `operation_seconds` is the fixed cost of one small torch operation."""

    tier: str
    name: str
    matmul: tuple[tuple[str, Rate], ...]
    elementwise: Rate
    copy: float
    update: float
    operation_seconds: float
    count: int = 1
    cores: int = 1

    def __post_init__(self) -> None:
        # A file may tell its dtypes in any order; equal processors are equal whichever it was.
        object.__setattr__(self, "matmul", tuple(sorted(self.matmul, key=lambda pair: pair[0])))

    def matmul_rate(self, dtype: str, rows: float) -> float:
        """Return FLOP/s of a product whose left matrix has `rows` rows. Raises OptionError for a dtype without rate."""
        rates = dict(self.matmul)
        if dtype not in rates:
            raise OptionError(f"{self.name} has no matmul rate for {dtype}; it has: {', '.join(rates) or 'none'}.")
        return rates[dtype].at(rows)


@dataclass(frozen=True)
class Nodes:
    """How many equal nodes there are, and what one of them sends to others a second, all its devices together.

    Raises OptionError when there are several and nothing between them."""

    count: int = 1
    bytes_per_second: float = 0.0
    latency: float = 0.0

    def __post_init__(self) -> None:
        if self.count > 1 and self.bytes_per_second == 0:
            raise OptionError(f"{self.count} nodes need bytes_per_second between them.")


@dataclass(frozen=True)
class Close:
    """How many neighbouring devices of a node at a time have faster links to each other than to its others, and what one of
    them sends there a second: pairs with a bridge, for instance.

    Raises OptionError when there are several and nothing between them."""

    count: int = 1
    bytes_per_second: float = 0.0
    latency: float = 0.0

    def __post_init__(self) -> None:
        if self.count > 1 and self.bytes_per_second == 0:
            raise OptionError(f"{self.count} devices that are close need bytes_per_second between them.")


@dataclass(frozen=True)
class Unlike:
    """`count` nodes of a cluster that are otherwise than the first ones, the last of them: what they have of `host` and
    `disk`, and how fast that disk is in any direction."""

    count: int = 1
    host: int | None = None
    disk: int | None = None
    disk_bytes_per_second: float | None = None

    def of(self, machine: Machine) -> Machine:
        """One of these nodes."""
        own = {"host": self.host, "disk": self.disk}
        capacities = tuple(replace(each, nbytes=own.get(each.tier) or each.nbytes) for each in machine.capacities)
        links, limits = machine.links, machine.limits
        if (rate := self.disk_bytes_per_second) is not None:
            slow = {link for link in links if "disk" in (link.source, link.target)}
            shared = {link.shared for link in slow}
            links = tuple(replace(link, bytes_per_second=rate) if link in slow else link for link in links)
            limits = tuple(replace(limit, bytes_per_second=rate) if limit.name in shared else limit for limit in limits)
        return replace(machine, capacities=capacities, links=links, limits=limits, unlike=())


@dataclass(frozen=True)
class Spread:
    """What a probe saw of one figure: the median of several measurements, and the least and the greatest of them.

    `unit` is that of all three: "B/s", "FLOP/s", "param/s" or "s"."""

    figure: str
    unit: str
    lowest: float
    median: float
    highest: float
    times: int

    @classmethod
    def of(cls, figure: str, unit: str, values: Sequence[float]) -> Spread:
        """Return the spread of `values`, of which there is at least one."""
        return cls(figure, unit, min(values), median(values), max(values), len(values))


@dataclass(frozen=True)
class Machine:
    """One node, how many of them, and which are `unlike` it. Tiers: `host` always, `device` with GPUs, `disk`, and others by
    any name (`cxl`).

    `origin` says where the figures come from: "described", "probed ..." or "estimated ...". `notes` say what the figures
    do not show; `spreads` are those of a probe.

    Raises OptionError when a link, a limit or a processor names something that is not there."""

    name: str
    capacities: tuple[Capacity, ...]
    links: tuple[Link, ...]
    processors: tuple[Processor, ...]
    limits: tuple[Limit, ...] = ()
    nodes: Nodes = Nodes()
    close: Close = Close()
    origin: str = "described"
    notes: tuple[str, ...] = ()
    spreads: tuple[Spread, ...] = ()
    unlike: tuple[Unlike, ...] = ()

    def __post_init__(self) -> None:
        self.processor("host")
        self.processor(self.compute.tier)
        others = sum(each.count for each in self.unlike)
        if self.unlike and others >= self.nodes.count:
            raise OptionError(f"of {self.nodes.count} nodes {others} cannot be unlike the first one.")
        for tier in (processor.tier for processor in self.processors):
            self.capacity(tier)
        for link in self.links:
            self.capacity(link.source)
            self.capacity(link.target)
            if link.shared is not None:
                self.limit(link.shared)
        links = [f"{link.source} to {link.target}" for link in self.links]
        for names in (list(self.tiers), links, [processor.tier for processor in self.processors]):
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise OptionError(f"the machine {self.name} has two of {twice[0]!r}.")

    @property
    def tiers(self) -> tuple[str, ...]:
        return tuple(capacity.tier for capacity in self.capacities)

    @property
    def compute(self) -> Processor:
        """The processor that runs the model: the devices where there are any, else the host's."""
        return self.processor("device" if "device" in self.tiers else "host")

    @property
    def hosted(self) -> Machine:
        """The same without its devices: the host computes."""
        if "device" not in self.tiers:
            return self
        return replace(
            self,
            capacities=tuple(each for each in self.capacities if each.tier != "device"),
            links=tuple(link for link in self.links if "device" not in (link.source, link.target)),
            processors=tuple(each for each in self.processors if each.tier != "device"),
            close=Close(),
        )

    def node(self, index: int) -> Machine:
        """The machine that one of the nodes is."""
        first = self.nodes.count - sum(each.count for each in self.unlike)
        for each in self.unlike:
            first += each.count
            if first - each.count <= index < first:
                return each.of(self)
        return self

    def capacity(self, tier: str) -> int:
        """Return the bytes of `tier` in one node, or of one device. Raises OptionError when there is no such tier."""
        return _named(self, "tier", {capacity.tier: capacity.nbytes for capacity in self.capacities}, tier)

    def link(self, source: str, target: str) -> Link:
        """Return the direct link. Raises OptionError when there is none."""
        links = {f"{link.source} to {link.target}": link for link in self.links}
        return _named(self, "link", links, f"{source} to {target}")

    def limit(self, name: str) -> float:
        """Return the joint bytes a second of the links that share `name`. Raises OptionError when it is not described."""
        return _named(self, "limit", {limit.name: limit.bytes_per_second for limit in self.limits}, name)

    def slowed(self, tier: str, times: float) -> Machine:
        """Return the same, with what moves from and to `tier` so many times as slow."""
        links = tuple(
            replace(link, bytes_per_second=link.bytes_per_second / times)
            if tier in (link.source, link.target)
            else link
            for link in self.links
        )
        shared = {link.shared for link in self.links if tier in (link.source, link.target)}
        limits = (
            replace(limit, bytes_per_second=limit.bytes_per_second / times) if limit.name in shared else limit
            for limit in self.limits
        )
        return replace(self, links=links, limits=tuple(limits))

    def processor(self, tier: str) -> Processor:
        """Return what computes on the bytes of `tier`. Raises OptionError when nothing does."""
        return _named(self, "processor", {processor.tier: processor for processor in self.processors}, tier)


def _named(machine: Machine, what: str, values: dict[str, Value], name: str) -> Value:
    if name not in values:
        raise OptionError(f"the machine {machine.name} has no {what} {name!r}; it has: {', '.join(values) or 'none'}.")
    return values[name]
