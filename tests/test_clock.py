"""Simulated time: what compute and transfers take, alone and together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from outsize.machine.find import find_machine
from outsize.machine.machine import Machine
from outsize.memory.block import Block, make_block
from outsize.memory.null import NullTier
from outsize.memory.transfer import PIECE
from outsize.planner.clock import HANDLING, Rates, SimulatedClock, SimulatedTicket, SimulatedTransfers, ways_of
from outsize.planner.play import Nothing, play
from outsize.planner.script import Begin, Create, Mark, Script, Spend, Touched
from outsize.planner.thrashed import THRASHING

GB = 10**9
DISK = NullTier("disk", 1 << 60)
HOST = NullTier("host", 1 << 60)


def clock(latency: float = 0.0, both: float = 2 * GB) -> SimulatedClock:
    return SimulatedClock({"disk": Rates(GB, GB, both, latency), "host": Rates(10 * GB, 10 * GB, 20 * GB, 0.0)})


def transfer(transfers: SimulatedTransfers, direction: str, nbytes: int, tier: NullTier = DISK) -> SimulatedTicket:
    extent = tier.allocate(nbytes)
    return getattr(transfers, direction)(tier, extent, 0, Nothing(nbytes))


def test_a_transfer_takes_its_bytes_and_its_latency() -> None:
    now = clock(latency=0.25)
    transfer(SimulatedTransfers(now), "write", GB).wait()
    assert now.time == pytest.approx(1.25)
    assert now.seconds["waiting"] == pytest.approx(1.25)


def test_transfers_go_on_while_something_is_computed() -> None:
    now = clock()
    ticket = transfer(SimulatedTransfers(now), "read", GB)
    now.spend("compute", 0.75)
    assert not ticket.done and now.time == pytest.approx(0.75)
    now.spend("update", 0.5)
    assert ticket.done and now.time == pytest.approx(1.25)
    assert now.seconds == pytest.approx({"compute": 0.75, "update": 0.5, "read": 1.0})


def test_both_directions_at_once_keep_to_their_joint_rate() -> None:
    now = clock(both=1.25 * GB)
    transfers = SimulatedTransfers(now)
    tickets = [transfer(transfers, direction, GB) for direction in ("read", "write")]
    for ticket in tickets:
        ticket.wait()
    assert now.time == pytest.approx(2 / 1.25, rel=0.02)


def test_two_ways_do_not_disturb_each_other() -> None:
    now = clock()
    transfers = SimulatedTransfers(now)
    slow, fast = transfer(transfers, "read", PIECE, DISK), transfer(transfers, "read", PIECE, HOST)
    fast.wait()
    assert now.time == pytest.approx(PIECE / (10 * GB)) and not slow.done
    slow.wait()
    assert now.time == pytest.approx(PIECE / GB)


def test_writes_keep_their_order_and_what_follows_them_waits() -> None:
    now, seen = clock(), []
    transfers = SimulatedTransfers(now)
    extent = DISK.allocate(GB)
    for number in range(2):
        transfers.write(DISK, extent, 0, Nothing(GB), then=lambda error, number=number: seen.append(number))
    transfers.after_writes(lambda: seen.append("durable")).wait()
    assert seen == [0, 1, "durable"]
    assert now.time == pytest.approx(2.0 + now.ways["disk"].flush)


def test_spans_join_where_one_goes_on_as_another_ended() -> None:
    now = clock()
    for _ in range(3):
        now.spend("compute", 0.5)
    now.spend("update", 0.5)
    assert now.spans == [("compute", 0.0, 1.5), ("update", 1.5, 2.0)]


def test_a_machines_links_are_its_ways() -> None:
    machine = find_machine("two-cores")
    handling = HANDLING * machine.compute.operation_seconds
    assert ways_of(machine)["disk"] == Rates(
        1.1e9, 2.8e9, 1.3e9, 65e-6, reading=1 / 68e9, writing=1 / 18e9, handling=handling
    )


@pytest.mark.parametrize(("latency", "seconds"), [(0.0, 3.0), (0.2, 3.0), (0.5, 2.4)])
def test_small_transfers_take_of_a_core_what_they_take_however_small(latency: float, seconds: float) -> None:
    """A tenth of a second each: ten that are through while two seconds are computed add one to them."""
    now = SimulatedClock({"disk": Rates(10.0, 10.0, 20.0, latency, handling=0.1)})
    for _ in range(10):
        now.submit("disk", "write", 1, lambda: None)
    now.spend("compute", 2.0)
    assert now.time == pytest.approx(seconds)


def test_what_others_do_meanwhile_makes_no_transfer_take_more_of_a_core() -> None:
    now = SimulatedClock({"disk": Rates(10.0, 10.0, 20.0, 0.2, handling=0.1)}, readers=1)
    for direction in ("read", "write", "write", "write", "write", "write"):
        now.submit("disk", direction, 1, lambda: None)
    now.spend("compute", 2.0)
    assert now.time == pytest.approx(2.6)


BUSY = Rates(GB, GB, 2 * GB, 0.0, reading=0.1 / GB, writing=0.3 / GB)


def test_what_transfers_take_of_a_core_compute_loses() -> None:
    now = SimulatedClock({"disk": BUSY})
    ticket = transfer(SimulatedTransfers(now), "write", GB)
    now.spend("compute", 1.4)  # 0.7 while it is written, in a second, and as much after that
    assert ticket.done and now.time == pytest.approx(1.7)
    assert now.seconds == pytest.approx({"compute": 1.7, "write": 1.0})


def test_who_waits_for_others_loses_nothing_to_transfers() -> None:
    now = SimulatedClock({"disk": BUSY})
    transfer(SimulatedTransfers(now), "write", GB)
    now.finish(now.exchange(0.5, ahead=False))
    assert now.time == pytest.approx(0.5)


def test_exchanges_ahead_go_on_while_a_step_computes_and_share_the_wire_with_those_it_waits_for() -> None:
    now = SimulatedClock({})
    first, second = (now.exchange(1.0, ahead=True) for _ in range(2))
    now.spend("compute", 0.5)
    now.finish(now.exchange(0.25, ahead=False))  # at half the speed: half a second
    assert now.time == pytest.approx(1.0) and not first.done
    now.finish(first)
    assert now.time == pytest.approx(1.25) and not second.done
    now.spend("compute", 2.0)
    assert second.done and now.time == pytest.approx(3.25)
    assert now.seconds == pytest.approx({"compute": 2.5, "exchange": 2.25, "wire": 0.75})


def test_what_is_exchanged_meanwhile_takes_its_part_of_a_core() -> None:
    now = SimulatedClock({})
    ticket = now.exchange(1.0, ahead=True, busy=0.25)
    now.spend("compute", 1.0)  # three quarters of it meanwhile
    assert ticket.done and now.time == pytest.approx(1.25)


def test_compute_keeps_half_of_what_it_has() -> None:
    now = SimulatedClock({"disk": Rates(GB, GB, 2 * GB, 0.0, writing=5 / GB)})
    transfer(SimulatedTransfers(now), "write", GB)
    now.spend("update", 0.25)
    assert now.time == pytest.approx(0.5)


def test_an_exchange_that_wants_a_whole_core_takes_longer_while_something_is_computed() -> None:
    now = SimulatedClock({})
    ticket = now.exchange(1.0, ahead=True, busy=1.0)
    now.spend("compute", 0.25)  # half a core for each: half a second
    assert now.time == pytest.approx(0.5) and not ticket.done
    now.finish(ticket)  # alone again
    assert now.time == pytest.approx(1.25)
    ticket = now.exchange(1.0, ahead=True, busy=1.0)
    now.spend("compute", 1.0)
    assert ticket.done and now.time == pytest.approx(3.25)


def test_processors_lose_to_transfers_only_where_they_compute() -> None:
    def costly(machine: Machine) -> Machine:
        return replace(machine, links=tuple(replace(link, bytes_per_core_second=10 * GB) for link in machine.links))

    here, gpu = (ways_of(costly(find_machine(name)))["disk"] for name in ("two-cores", "rtx-4090"))
    assert (here.reading, here.writing) == (1 / (10 * GB), 1 / (10 * GB))
    assert (gpu.reading, gpu.writing) == (0.0, 0.0)


def script_of(*blocks: Block, beside: float = 0.0, written: bool = True) -> Script:
    """That computes for half a second with each in turn, and changes none; `written` before."""
    work = [
        event
        for block in blocks
        for event in (Touched("take", block.name), Spend("compute", 0.5, beside=beside), Touched("give", block.name))
    ]
    made = [Create(block, "disk", True) for block in blocks]
    put = [Touched(what, block.name) for block in blocks for what in ("fresh", "give")] if written else []
    return Script((*made, *put), ((Begin("step"), *work, Mark.END),))


@pytest.mark.parametrize("home", ["disk", "host"])
def test_what_streams_leaves_nothing_in_the_caches(home: str) -> None:
    """Compute that takes a second takes up to one more while blocks stream, by how many bytes they are."""
    blocks = [make_block(name, [("all", "weight", torch.uint8, (THRASHING // 8,))]) for name in "ab"]
    script = script_of(*blocks, beside=0.5)
    ways = {"disk": Rates(GB, GB, 2 * GB, 0.0)}
    before, step = play(script, THRASHING // 8, lambda name: home, ways, steps=3).steps[-2:]
    streamed = sum(before.moved.values())
    assert (streamed > 0) == (home == "disk")
    assert step.lanes["compute"] == pytest.approx(1.0 + streamed / THRASHING)


def test_a_foretold_step_is_read_ahead_from_the_first_on_and_needs_no_recording() -> None:
    """Of three blocks two have room, and the next one comes in the half second in which one is computed with."""
    blocks = [make_block(name, [("all", "weight", torch.uint8, (THRASHING,))]) for name in "abc"]
    ways = {"disk": Rates(4 * THRASHING, GB, GB, 0.0)}
    arguments = (script_of(*blocks, beside=0.5), 2 * THRASHING, lambda name: "disk", ways)
    first, second = play(*arguments, steps=2, foretold=True).steps
    recorded, *later = play(*arguments, steps=3).steps
    assert first.waiting["read"] == pytest.approx(0.25)  # for the first block alone
    assert recorded.waiting["read"] >= 0.5  # each block that was not near yet
    assert (
        first.lanes["compute"] == second.lanes["compute"] == pytest.approx(3.0)
    )  # what streams costs in the first, too
    assert [step.accesses for step in (first, second)] == [step.accesses for step in later]
    assert second.moved == later[-1].moved and second.seconds == pytest.approx(later[-1].seconds)


def test_a_foretold_step_reads_what_steps_before_it_would_have_written() -> None:
    blocks = [make_block(name, [("all", "moment", torch.uint8, (THRASHING,))]) for name in "abc"]
    ways = {"disk": Rates(4 * THRASHING, GB, GB, 0.0)}
    arguments = (script_of(*blocks, written=False), THRASHING, lambda name: "disk", ways)
    assert not play(*arguments, steps=1).steps[0].moved
    (step,) = play(*arguments, steps=1, foretold=True).steps
    assert step.moved == {("disk", "host", "moment"): 3 * THRASHING} and step.waiting["read"] > 0
