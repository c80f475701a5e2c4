"""What waits for backward in another tier: stored once, counted exactly, and given back whatever becomes of the graph.
That it never changes a number is tested with everything else, in test_exactness.py and test_own_loop.py."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exactness import (
    ACTIVATIONS_OF,
    Batch,
    Setting,
    assert_idle,
    assert_same_weights,
    bind_job,
    make_batches,
    make_job,
    make_model,
    make_pair,
    make_plan,
)
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

import outsize
from outsize.errors import ModelError, OptionError
from outsize.machine.find import find_machine
from outsize.memory.disk import DiskTier
from outsize.memory.host import HostTier, allocate_slab
from outsize.memory.store import Store
from outsize.memory.tier import PAGE, pages
from outsize.memory.transfer import Transfers
from outsize.model.activations import PRODUCTS, Mover, Parcel, Results, run_unit
from outsize.model.units import find_units
from outsize.plan import MOVE, Activations, Plan
from outsize.planner.clock import ways_of
from outsize.planner.needs import pinned_peak
from outsize.planner.play import play
from outsize.planner.prices import RatedPrices
from outsize.planner.rehearsal import homes, rehearse
from outsize.planner.script import Script
from outsize.train.job import Job, always_near
from outsize.train.optimizers import default_rule

ADAMW = default_rule("adamw", {"lr": 1e-3, "weight_decay": 0.1})


def make_mover(tmp_path: Path, near: int = 64 * PAGE, least: int = 1) -> Mover:
    tiers = {"host": HostTier(1 << 30), "disk": DiskTier(tmp_path / "blocks", 1 << 30)}
    return Mover(Store(tiers, near, allocate_slab, Transfers()), least)


def assert_nothing_waits(mover: Mover) -> None:
    gc.collect()
    mover.settle()
    mover.store.flush()
    names = [name for name in mover.store.entries if name.startswith("activation:")]
    assert names and not any(mover.store.has_bytes(name) for name in names)
    assert all(mover.store.entries[name].pins == 0 for name in names)
    assert mover.store.ledger.held["host", "activation"] == 0


# -- the bytes of a storage, once --------------------------------------------------------------------------------------


def test_views_of_one_storage_wait_in_one_block(tmp_path: Path) -> None:
    mover = make_mover(tmp_path)
    whole = torch.randn(6, 4, 10)
    views = [whole, whole.transpose(0, 2), whole[2:5, 1], whole.view(-1)[7:], whole[:, :1].expand(6, 4, 10)]
    views += [whole.view(torch.int32), whole.detach().requires_grad_()]
    wanted = [view.detach().clone() for view in views]
    strides = [view.stride() for view in views]
    parcels = [mover.pack(view, "disk") for view in views]
    del whole, views
    assert mover.store.ledger.moved["host", "disk", "activation"] == PAGE
    found = [mover.unpack(parcel) for parcel in parcels if isinstance(parcel, Parcel)]
    for tensor, values, stride in zip(found, wanted, strides, strict=True):
        assert torch.equal(tensor, values) and tensor.stride() == stride and tensor.dtype == values.dtype
    del parcels, tensor, found
    assert_nothing_waits(mover)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.uint8]
)
def test_every_dtype_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    mover = make_mover(tmp_path, near=4 * PAGE)
    tensors = [torch.randint(0, 2, (1000 + index,)).to(dtype) for index in range(9)]  # more than fit near
    parcels = [mover.pack(tensor.clone(), "disk") for tensor in tensors]
    for tensor, parcel in zip(reversed(tensors), reversed(parcels), strict=True):
        assert isinstance(parcel, Parcel)
        assert torch.equal(mover.unpack(parcel), tensor)
        del parcel
        parcels.pop()
    assert_nothing_waits(mover)


def test_a_storage_that_has_changed_is_another(tmp_path: Path) -> None:
    """Backward is given what the tensor held when it was saved."""
    mover = make_mover(tmp_path)
    tensor = torch.zeros(100)
    before = mover.pack(tensor, "disk")
    tensor.add_(1)
    after = mover.pack(tensor, "disk")
    assert isinstance(before, Parcel) and isinstance(after, Parcel)
    assert mover.unpack(before).sum() == 0 and mover.unpack(after).sum() == 100


def test_what_is_small_held_anyway_or_not_just_numbers_stays(tmp_path: Path) -> None:
    mover = make_mover(tmp_path, least=400)
    known = torch.zeros(1000)
    mover.fixed.add(known.untyped_storage()._cdata)
    complex_numbers = torch.zeros(1000, dtype=torch.complex64)
    sparse = torch.eye(100).to_sparse()
    for tensor in (torch.zeros(99), known, known[3:], complex_numbers.conj(), complex_numbers.conj().imag, sparse):
        kept = mover.pack(tensor, "disk")
        assert isinstance(kept, torch.Tensor) and kept.layout == tensor.layout
    assert isinstance(mover.pack(torch.zeros(100), "disk"), Parcel)


# -- graphs and what becomes of them -----------------------------------------------------------------------------------


def test_a_tensor_in_use_keeps_its_bytes_when_its_graph_is_gone(tmp_path: Path) -> None:
    """Gradients of gradients are made of what backward was given."""
    mover = make_mover(tmp_path, near=12 * PAGE)
    x = torch.randn(700, dtype=torch.float64, requires_grad=True)

    def second(hooks: Callable) -> torch.Tensor:
        with hooks():
            y = (x.sin() * x.exp()).pow(3).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        del y
        for _ in range(3):  # others come and go over the same room
            mover.pack(torch.full((700,), 7.0, dtype=torch.float64), "disk")
            mover.settle()
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    moved = second(lambda: saved_tensors_hooks(lambda tensor: mover.pack(tensor, "disk"), mover.unpack))
    assert torch.equal(moved, second(lambda: saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)))
    assert_nothing_waits(mover)


@pytest.mark.parametrize("name", ["move", "mixed"])
def test_graphs_used_twice_and_thrown_away(name: str, tmp_path: Path) -> None:
    setting = Setting("fp32", "disk", hold=True, activations=ACTIVATIONS_OF[name], arena=2 << 20)
    pair = make_pair("llama", True, ADAMW, setting, tmp_path)
    for first, second in make_batches(3, 2):
        for model in (pair.job.model, pair.plain.model):
            thrown_away = model(**second).loss
            loss = model(**first).loss
            loss.backward(retain_graph=True)
            if model is pair.plain.model:
                pair.plain.take_gradients()
            loss.backward()
            del thrown_away
        pair.plain.take_gradients()
        pair.job.step()
        pair.plain.update()
    del loss, model
    assert_same_weights(pair.job, pair.plain)
    assert_nothing_waits(pair.job.attachment._mover)
    assert_idle(pair.job)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", ["move", "mixed"])
def test_nothing_waits_after_a_step(name: str, accumulate: int, tmp_path: Path) -> None:
    setting = Setting("fp32", "disk", accumulate, activations=ACTIVATIONS_OF[name])
    job = make_job(make_model("gemma3"), ADAMW, setting, tmp_path)
    for index, micro_batches in enumerate(make_batches(3, accumulate)):
        job.train_step(micro_batches, again=index < 2)
    assert_nothing_waits(job.attachment._mover)
    assert_idle(job)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", ["move", "mixed"])
def test_the_job_goes_on_after_a_failure_within_backward(name: str, accumulate: int, tmp_path: Path) -> None:
    """The step that failed has changed some weights already; what it moved is given back, and a next one learns."""
    setting = Setting("fp32", "disk", accumulate, activations=ACTIVATIONS_OF[name])
    job = make_job(make_model("handwritten"), ADAMW, setting, tmp_path)
    first, second = make_batches(2, accumulate)
    job.train_step(first)

    def fail(gradient: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("in backward")

    handle = job.model.blocks[4].norm.register_forward_hook(lambda m, args, states: states.register_hook(fail) and None)
    with pytest.raises(ZeroDivisionError):
        job.train_step(second)
    handle.remove()
    assert_nothing_waits(job.attachment._mover)


# -- predictions -------------------------------------------------------------------------------------------------------


LAPTOP = find_machine("laptop")


def rehearsed(model: nn.Module, plan: Plan, micro_batches: list[Batch]) -> Script:
    return rehearse(model, plan, ADAMW, RatedPrices(LAPTOP), micro_batches, torch.float32).whole


@pytest.mark.parametrize("saved", ["all", "attention", "products", "input"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "t5", "handwritten"])
def test_as_many_bytes_move_as_predicted(family: str, saved: str, tmp_path: Path) -> None:
    steps = make_batches(3, 3)
    setting = Setting("mixed", "disk", 3, activations=Activations(saved, "disk"), arena=6 << 20)
    plan = make_plan(make_model(family), setting)
    script = rehearsed(make_model(family), plan, steps[0])
    placement = homes(plan, always_near(find_units(make_model(family))))
    played = play(script, plan.arena_bytes, placement, ways_of(LAPTOP)).steps[-1]
    predicted = played.moved["host", "disk", "activation"]
    assert predicted > 0
    job = bind_job(make_model(family), ADAMW, plan, tmp_path)
    for micro_batches in steps:
        before = job.store.ledger.moved.copy()
        job.train_step(micro_batches)
        moved = job.store.ledger.moved - before
        assert moved["host", "disk", "activation"] == predicted
        assert moved["disk", "host", "activation"] <= predicted
    assert_idle(job)


def test_as_much_is_leased_as_predicted(tmp_path: Path) -> None:
    """With room for twice what is pinned at once a step runs."""
    model, (micro_batch,) = make_model("llama", layers=8), make_batches(1, 1)[0]
    plan = make_plan(model, Setting("fp32", "near", activations=MOVE))
    script = rehearsed(model, plan, [micro_batch])
    leased = pinned_peak(script, lambda name: "disk" if name.startswith("activation:") else "host")
    job = bind_job(model, ADAMW, replace(plan, arena_bytes=pages(2 * leased)), tmp_path / "enough")
    job.train_step([micro_batch])
    assert job.store.ledger.moved["disk", "host", "activation"] > 0
    assert_nothing_waits(job.attachment._mover)


# -- products ----------------------------------------------------------------------------------------------------------


class Scores(nn.Module):
    """Changes the result of a matrix product in place, as some attention does with its mask."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return functional.softmax((states @ self.weight).add_(states), -1)


@pytest.mark.parametrize("home", ["near", "disk"])
def test_a_product_changed_in_place_is_never_taken_for_what_it_was(home: str, tmp_path: Path) -> None:
    mover, module, states = make_mover(tmp_path), Scores(), torch.randn(5, 16, requires_grad=True)
    wanted = torch.autograd.grad(module(states).pow(2).sum(), (states, module.weight))

    def pack(tensor: torch.Tensor) -> torch.Tensor | Parcel:
        return mover.pack(tensor, home) if home == "disk" else tensor

    def unpack(saved: torch.Tensor | Parcel) -> torch.Tensor:
        return mover.unpack(saved) if isinstance(saved, Parcel) else saved

    out = run_unit(Activations("products", home), module, lambda: None, pack, unpack, (states,), {})
    if home == "near":
        with pytest.raises(ModelError, match="in place"):
            torch.autograd.grad(out.pow(2).sum(), (states, module.weight))
        return
    found = torch.autograd.grad(out.pow(2).sum(), (states, module.weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    with pytest.raises(ModelError, match="in place"):
        torch.autograd.grad(out.pow(2).sum(), (states, module.weight))


def test_products_are_not_computed_again() -> None:
    counts = {"mm": 0}

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts["mm"] += func.overloadpacket is torch.ops.aten.mm
            return func(*args, **(kwargs or {}))

    module, states = nn.Linear(16, 16, bias=False), torch.randn(5, 16)
    products = Results(lambda tensor: tensor.clone(), lambda saved: saved, PRODUCTS)
    with torch.no_grad(), Counting():
        for _ in range(3):
            products.begin()
            with products:
                module(states)
    assert counts["mm"] == 1


def test_attention_is_not_computed_again_where_its_results_are_kept() -> None:
    counts: Counter[str] = Counter()

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[str(func.overloadpacket)] += 1
            return func(*args, **(kwargs or {}))

    block, states = make_model("llama").model.layers[0], torch.randn(1, 8, 64, requires_grad=True)
    turned = (torch.ones(1, 8, 16), torch.zeros(1, 8, 16))

    def computed(saved: str) -> Counter[str]:
        counts.clear()
        with Counting():
            out = run_unit(
                *(Activations(saved), block, lambda: None, lambda tensor: tensor.detach(), lambda saved: saved),
                *((states,), {"position_embeddings": turned}),
            )
            out.sum().backward()
        return Counter(counts)

    attention = "aten._scaled_dot_product_flash_attention_for_cpu"
    every = {saved: computed(saved) for saved in ("all", "products", "attention", "input")}
    assert {saved: found[attention] for saved, found in every.items()} == {
        "all": 1,
        "products": 1,
        "attention": 1,
        "input": 2,
    }
    assert every["products"]["aten.mm"] == every["all"]["aten.mm"] < every["attention"]["aten.mm"]
    assert every["attention"]["aten.mm"] == every["input"]["aten.mm"]


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_plan_that_cannot_be_obeyed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="all, products, attention and input"):
        Activations("some")
    cases: dict[str, tuple[str, Activations]] = {
        "not a unit": ("model.layers.9", MOVE),
        "'tape'.*not a tier": ("model.layers.0", Activations("all", "tape")),
        "leases no weights": ("model.norm", MOVE),
    }
    for number, (message, choice) in enumerate(cases.items()):
        model = make_model("llama")
        near = frozenset(name for name, _ in model.named_parameters())
        plan = Plan("fp32", 1 << 20, near, near, gradient_home="host", activations=(choice,))
        with pytest.raises(OptionError, match=message):
            bind_job(model, ADAMW, plan, tmp_path / str(number))


@pytest.mark.parametrize("activations", ["keep", "recompute", "attention", "move"])
def test_the_choice_is_the_callers(activations: str, tmp_path: Path) -> None:
    job: Job = outsize.attach(
        make_model("llama"), torch.optim.AdamW, {"lr": 1e-3},
        memory="4GiB", directory=tmp_path, sequence_length=16, batch_size=2, activations=activations,
    )  # fmt: skip
    assert {choice for _, choice in job.plan.activations} == {ACTIVATIONS_OF[activations]}
    (batch,) = make_batches(1, 1)[0]
    job.model(**batch).loss.backward()
    job.step()
    job.close()
    with pytest.raises(OptionError, match="keep, attention, recompute, move"):
        outsize.attach(make_model("llama"), torch.optim.SGD, memory="4GiB", directory=tmp_path / "x", activations="all")
