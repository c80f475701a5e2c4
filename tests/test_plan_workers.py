"""Plans of several workers on described machines: what crosses which link, how long that takes, and where weights lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
from models import tiny_model

import outsize
from outsize.distributed.arrangement import Arrangement
from outsize.errors import OptionError
from outsize.machine.find import find_machine
from outsize.machine.machine import Link, Machine, Nodes
from outsize.plan import Plan

LAPTOP = find_machine("laptop")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", tied=True, layers=8, hidden=512).save_pretrained(folder)
    return str(folder)


def cluster(bytes_per_second: float, nodes: int = 2) -> Machine:
    return replace(LAPTOP, nodes=Nodes(nodes, bytes_per_second, 1e-4), links=(*LAPTOP.links, Link("host", "host", 5e9)))


def planned(model: str, machine: Machine, workers: int | None, zero: int = 3) -> Plan:
    memory = "2GiB"
    return outsize.plan(
        model, memory=memory, machine=machine, workers=workers, zero=zero, sequence_length=32, accumulate=4
    )


def received(plan: Plan, tier: str) -> int:
    assert plan.predicted is not None
    return sum(nbytes for source, _, _, nbytes in plan.predicted.moved if source == tier)


def test_a_slow_link_is_waited_for_and_each_node_gets_a_copy_of_the_weights(model: str) -> None:
    slow, fast = planned(model, cluster(1e8), 4), planned(model, cluster(1e11), 4)
    assert (slow.workers, slow.nodes, slow.weight_copies) == (4, 2, 2)
    assert slow.predicted is not None and fast.predicted is not None
    assert slow.predicted.wire_bytes == received(slow, "peer") + received(slow, "remote")
    least = received(slow, "remote") / (1e8 / 2)  # which the two workers of a node share
    assert slow.predicted.wire_wait_seconds is not None and slow.predicted.wire_wait_seconds >= least
    assert slow.predicted.seconds_per_step is not None and fast.predicted.wire_wait_seconds is not None
    assert slow.predicted.seconds_per_step >= slow.predicted.wire_wait_seconds > fast.predicted.wire_wait_seconds
    flat = planned(model, cluster(1e8, nodes=4), 4)
    assert received(flat, "peer") == 0 and received(flat, "remote") > 2 * received(slow, "remote")
    assert "each of 2 nodes has a copy" in str(slow) and "95.37 MiB/s" not in str(slow)
    assert "exchanging with other workers" in str(slow)


def test_a_cluster_has_a_worker_on_each_node_and_one_machine_a_single_one(model: str) -> None:
    assert planned(model, cluster(1e9, nodes=3), None).workers == 3
    alone = planned(model, LAPTOP, None)
    assert (alone.workers, alone.predicted.wire_bytes if alone.predicted else None) == (1, 0)
    assert "other workers" not in str(alone)


def test_what_cannot_be_divided_is_refused(model: str) -> None:
    for copies in (3, 4):
        with pytest.raises(OptionError, match=f"4 workers on 2 nodes cannot have {copies} copies"):
            Arrangement.of(0, 4, 2).stage_of(copies)
    with pytest.raises(OptionError, match="3 workers cannot be equally many on each of 2 nodes"):
        planned(model, cluster(1e9), 3)
    with pytest.raises(OptionError, match="A step of 4 sequences leaves nothing to do for some of 8 workers"):
        planned(model, cluster(1e9), 8)
