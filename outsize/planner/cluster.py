"""Several workers on a described machine, or on nodes of that kind: what is between them."""

from __future__ import annotations

from math import gcd

from outsize.distributed.arrangement import CLOSE, PEER, REMOTE
from outsize.distributed.wire import Link, Wire
from outsize.machine.machine import Machine

THROUGH_MEMORY = 6  # times that a byte between two processes passes through memory, by Gloo over the loopback; assumed


def places(machine: Machine) -> int:
    """Workers that find a processor for themselves on one node: its devices; or one, who uses all cores."""
    return machine.compute.count if machine.compute.tier == "device" else 1


def close_of(machine: Machine, each: int) -> int:
    """How many neighbours of the workers, `each` of them on every node, have faster links to each other."""
    return gcd(machine.close.count, each)


def wire_of(machine: Machine, each: int) -> Wire:
    """The links between the workers, `each` of them on every node; of those within a node that nobody has described, what its
    memory lets pass."""
    found, close = {}, close_of(machine, each)
    if close > 1:
        found[CLOSE] = Link(machine.close.bytes_per_second, machine.close.latency)
    if each > close:
        tier = machine.compute.tier
        direct = next((link for link in machine.links if link.source == link.target == tier), None)
        through = Link(machine.processor("host").copy / (THROUGH_MEMORY * each), busy=1.0)
        found[PEER] = through if direct is None else Link(direct.bytes_per_second, direct.latency)
    if machine.nodes.count > 1:
        found[REMOTE] = Link(machine.nodes.bytes_per_second / each, machine.nodes.latency)
    return found
