"""A rehearsal is the real run without bytes: it moves the same bytes and touches the same blocks in the same order."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import Setting, bind_job, make_batches, make_model, make_plan
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from worker_child import in_line

from outsize.machine.find import find_machine
from outsize.memory.store import Store
from outsize.model.units import find_units
from outsize.plan import KEEP, KEEP_ATTENTION, MOVE, MOVE_TO_HOST, Activations
from outsize.planner.clock import ways_of
from outsize.planner.fakes import VIEWS, Fakes, aten
from outsize.planner.live import CACHED, LiveBytes
from outsize.planner.needs import MANY
from outsize.planner.play import play
from outsize.planner.prices import Cold, Price, RatedPrices, nothing, operations_of
from outsize.planner.rehearsal import Rehearsal, Rehearsed, homes, rehearse
from outsize.planner.script import Event, HostUpdates, Live, Script, Spend
from outsize.train.job import always_near
from outsize.train.optimizers import uniform_rule

LAPTOP, CARD = find_machine("laptop"), find_machine("rtx-4090")
RULE = uniform_rule(torch.optim.AdamW, {"lr": 1e-3, "fused": True})
STEPS = 4
ON_DEVICE = "on a device, activations in its host's memory"

SETTINGS = {
    "all on disk": Setting(),
    "all near": Setting(placement="near"),
    "mixed placement and precision": Setting(placement="mixed", precision="mixed"),
    "kept activations": Setting(activations=KEEP),
    "clipped": Setting(clip=1.0, precision="mixed"),
    "clipped, gradients near": Setting(clip=1.0, gradient_home="host"),
    "three micro-batches": Setting(accumulate=3, arena=3 << 20),
    "blocks of the vocabulary": Setting(table_rows=64, precision="mixed"),
    "blocks of the vocabulary, two micro-batches, clipped": Setting(table_rows=64, accumulate=2, clip=1.0),
    "moved activations": Setting(activations=MOVE),
    "moved and recomputed in part": Setting(
        activations=(Activations("products", "disk"), KEEP), accumulate=2, arena=4 << 20
    ),
    "on a device": Setting(placement="device", precision="mixed", clip=1.0, gradient_home="host"),
    "results of attention kept": Setting(activations=KEEP_ATTENTION, precision="mixed"),
    ON_DEVICE: Setting(placement="device", activations=MOVE_TO_HOST),
    "by parts": Setting(parts=True),
    "by parts, two micro-batches of kept activations": Setting(parts=True, accumulate=2, activations=KEEP),
    "bf16 moments": Setting(precision="mixed", moments="bf16"),
}


class Seen:
    """The order in which a real store is asked."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.accesses: list[tuple[str, str]] = []
        lease, give = store.lease, store._give
        monkeypatch.setattr(store, "lease", lambda name, fresh=False: self._lease(lease, name, fresh))
        monkeypatch.setattr(store, "_give", lambda entry, touch: self._give(give, entry, touch))

    def _lease(self, lease, name, fresh):
        self.accesses.append(("fresh" if fresh else "take", name))
        return lease(name, fresh)

    def _give(self, give, entry, touch):
        self.accesses.append((touch.value, entry.block.name))
        give(entry, touch)


@pytest.mark.parametrize("family", ["llama", "gpt2", "handwritten"])
@pytest.mark.parametrize("name", SETTINGS)
def test_rehearsal_moves_what_the_real_run_moves(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = SETTINGS[name]
    if setting.table_rows and family == "handwritten":
        pytest.skip("has no head that can be computed in blocks")
    model = make_model(family, tied=True)
    plan = make_plan(model, setting)
    steps = [make_batches(1, setting.accumulate)[0]] * STEPS
    script = rehearse(model, plan, RULE, RatedPrices(LAPTOP), steps[0], torch.float32).whole
    always = always_near(find_units(model))
    ways = ways_of(CARD if plan.device_bytes else LAPTOP)
    on_host = HostUpdates.of(plan)
    rehearsal = play(script, plan.arena_bytes, homes(plan, always), ways, STEPS, plan.commit_every, plan.near, on_host)

    job = bind_job(model, RULE, plan, tmp_path)
    job.on_complete = lambda step: job.store.commit(lambda slots: None) if step % plan.commit_every == 0 else None
    before = Counter(job.store.ledger.moved)
    seen = Seen(job.store, monkeypatch)
    for number, micro_batches in enumerate(steps):
        seen.accesses.clear()
        job.train_step(micro_batches, again=number + 1 < STEPS)
    job.store.flush()
    foretold, moved = rehearsal.moved, job.store.ledger.moved - before
    if setting.table_rows:  # whether a row is still near when the embedding asks is a matter of time
        rows = STEPS * sum(batch["input_ids"].unique().numel() for batch in steps[0])
        row_bytes = 4 * model.get_input_embeddings().weight.shape[1]
        read = ("disk", "host", "weight")
        assert abs(foretold.pop(read) - moved.pop(read)) <= rows * row_bytes
    assert foretold == moved
    assert list(rehearsal.steps[-1].accesses) == seen.accesses
    assert rehearsal.disk_bytes == job.store.tiers["disk"].used
    job.close()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize(
    "name", ["all on disk", "kept activations", "clipped", "blocks of the vocabulary", ON_DEVICE, "by parts"]
)
def test_four_units_stand_for_all(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They ask the same of the store, in the same order; tensors alive are counted a little too high."""
    setting, most = SETTINGS[name], 1.1 if name == ON_DEVICE else 1.06  # of what has moved little is alive
    model = make_model(family, tied=True, layers=8)
    plan = make_plan(model, setting)
    micro_batches = make_batches(1, setting.accumulate)[0]
    short = rehearse(model, plan, RULE, RatedPrices(LAPTOP), micro_batches, torch.float32).whole
    monkeypatch.setattr("outsize.planner.rehearsal.FEWEST", 100)
    full = rehearse(model, plan, RULE, RatedPrices(LAPTOP), micro_batches, torch.float32).whole
    assert list(_asked(short.setup)) == list(_asked(full.setup))
    for one, other in zip(short.steps, full.steps, strict=True):
        assert list(_asked(one)) == list(_asked(other))
        assert _spent(one) == pytest.approx(_spent(other), rel=1e-3)
        assert _peak(other) <= _peak(one) <= most * _peak(other)


def test_four_units_of_each_leg_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do for a whole model; the other worker's are elsewhere."""
    legs = (1, 6, 1, 7)
    model = make_model("llama", tied=True, layers=sum(legs))
    plan = make_plan(model, Setting("mixed", "disk", accumulate=2, table_rows=64))
    plan = in_line(model, replace(plan, workers=2, legs=legs, schedule="interleaved"), 1)
    found = []
    for fewest in (6, 100):
        monkeypatch.setattr("outsize.planner.rehearsal.FEWEST", fewest)
        found.append(rehearse(model, plan, RULE, RatedPrices(LAPTOP), make_batches(1, 2)[0], torch.float32))
    short, full = found
    assert len(short.runs) == 2 and not full.runs
    assert short.work == pytest.approx(full.work, rel=1e-3)
    for one, other in zip(short.whole.steps, full.whole.steps, strict=True):
        assert list(_asked(one)) == list(_asked(other))
        assert _peak(other) <= _peak(one) <= 1.1 * _peak(other)


def _asked(events: Iterable[Event]) -> Iterator[Event]:
    return (event for event in events if not isinstance(event, Spend | Live))


def _spent(events: Iterable[Event]) -> float:
    return sum(event.seconds for event in events if isinstance(event, Spend))


def _peak(events: Iterable[Event]) -> int:
    return max(accumulate(event.nbytes for event in events if isinstance(event, Live)))


class Products(TorchDispatchMode):
    """Notes which products and attention are computed, on what shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def note(self, function: Any, args: Any, kwargs: Any) -> None:
        if operations_of(function) is not None or "attention" in str(function):
            given = (*args, *(kwargs or {}).values())
            self.seen.add((str(function), tuple(a.shape if isinstance(a, torch.Tensor) else type(a) for a in given)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(func, args, kwargs)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Noted(RatedPrices):
    products: Products = field(default_factory=Products)

    def of(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, cold: Cold = nothing
    ) -> Price:
        self.products.note(function, args, kwargs)
        return super().of(function, args, kwargs, result)


@dataclass(frozen=True)
class Far(RatedPrices):
    """Which operations between tensors are asked for, and which of their operands are cold."""

    seen: set[tuple[str, tuple[bool, ...]]] = field(default_factory=set)

    def of(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, cold: Cold = nothing
    ) -> Price:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        self.seen.add((str(function), tuple(map(cold, tensors))))
        return super().of(function, args, kwargs, result)


@pytest.mark.parametrize(
    ("setting", "cold"),
    [
        (Setting(), set()),
        (Setting(clip=1.0), {("aten.copy_.default", (True, False)), ("aten.linalg_vector_norm.default", (True,))}),
        (Setting(activations=MOVE), {("aten.copy_.default", (True, False))}),
    ],
)
def test_what_goes_home_and_comes_back_is_cold(setting: Setting, cold: set[Any]) -> None:
    """Gradients that wait and activations that move are copied into memory of the store; what a unit makes is not there."""
    prices = Far(LAPTOP)
    (micro_batches,) = make_batches(1, 1)
    rehearse(make_model("llama"), make_plan(make_model("llama"), setting), RULE, prices, micro_batches, torch.float32)
    copied = {seen for seen in prices.seen if seen[0].startswith(("aten.copy_", "aten.linalg")) and seen[1][0]}
    assert copied == cold
    assert ("aten.silu.default", (False,)) in prices.seen


def test_what_was_touched_long_ago_is_cold() -> None:
    live = LiveBytes(lambda event: None)
    with FakeTensorMode():
        first, other, slab = (torch.empty(n, dtype=torch.uint8) for n in (1 << 20, CACHED // 2, 1 << 20))
    live.ignore([slab])
    for tensor in (first, other, slab):
        live.see(tensor)
    live.touch([first, other])
    assert [live.is_cold(tensor) for tensor in (first, other, slab)] == [False, False, True], "what is the store's is"
    live.touch([(other, {"beside": other})])
    assert live.is_cold(first) and not live.is_cold(other)
    live.touch(first[:5])
    assert not live.is_cold(first), "its memory was touched, if only a part"


def test_what_is_made_lies_where_something_as_large_went() -> None:
    """So what one operation leaves and another makes is warm; where all is kept, what is made goes to cold memory."""
    live = LiveBytes(lambda event: None)

    def make(nbytes: int, warm: bool) -> torch.Tensor:
        with FakeTensorMode():
            made = torch.empty(nbytes, dtype=torch.uint8)
        live.see(made)
        assert live.is_cold(made) is not warm
        live.touch(made)
        assert not live.is_cold(made)
        return made

    kept = make(1 << 20, warm=False)
    make(1 << 20, warm=False)
    kept = [kept, make((1 << 20) + 4096, warm=True), make(1 << 20, warm=False)]
    make(1 << 18, warm=False)
    make(1 << 22, warm=False)
    del kept[0]
    make(CACHED + 1, warm=False)
    make(1 << 20, warm=False)


def test_work_that_is_only_written_down_again_ages_the_rest() -> None:
    model = make_model("llama")
    rehearsal = Rehearsal(model, make_plan(model, Setting()), RULE, RatedPrices(LAPTOP), torch.float32)
    live, repeat = rehearsal.live, rehearsal.job.repeat
    with rehearsal.mode:
        before, block = torch.empty(1 << 20), torch.empty(CACHED // 2 + 1, dtype=torch.uint8)
    live.see(before)
    live.touch(before)
    for cold in (False, True):
        repeat("sum", lambda: live.touch(block))
        assert live.is_cold(before) is cold


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3"])
@pytest.mark.parametrize("table_rows", [None, 64])
def test_the_same_products_are_rehearsed_that_a_run_computes(
    family: str, table_rows: int | None, tmp_path: Path
) -> None:
    """Attention with a mask is another kernel than without, and takes twice as long."""
    model = make_model(family)
    plan = make_plan(model, Setting(table_rows=table_rows))
    (micro_batches,) = make_batches(1, 1)
    prices, products = Noted(LAPTOP), Products()
    rehearse(model, plan, RULE, prices, micro_batches, torch.float32)
    job = bind_job(model, RULE, plan, tmp_path)
    with products:
        job.train_step(micro_batches)
    assert prices.products.seen == products.seen and any("attention" in name for name, _ in products.seen)
    job.close()


@pytest.mark.parametrize("lengths", [(32, 31), (12,) * 7, (4, 70), (49,), (40,) * 5])
def test_some_of_several_runs_are_fewer_than_twice_as_many(lengths: tuple[int, ...]) -> None:
    """What more units add is told by the difference, which must be one."""
    runs = tuple(tuple(f"{run}.{number}" for number in range(length)) for run, length in enumerate(lengths))
    rehearsed = Rehearsed(Script((), ()), runs)
    few, many = (rehearsed.some(number) for number in (MANY // 2, MANY))
    assert 2 * len(runs) <= len(few) < len(many) <= len(rehearsed.units) == len(rehearsed.some(len(rehearsed.units)))
    assert all({run[0], run[-1]} <= set(few) for run in runs)


def looked_at(mode: FakeTensorMode) -> list[tuple[Any, ...]]:
    """What each of `VIEWS` gives of a tensor of the mode, itself a view, or of none or one element along a side."""
    with mode:
        tensor = torch.empty(6, 8)[1:5, 2:6]
        square, narrow = torch.empty(4, 4), torch.empty(1, 4, 0, 1)
        told: dict[Any, list[tuple[Any, ...]]] = {
            aten.view.default: [(square, (2, 8)), (narrow, (4, 0)), (square[:1], (4, 1))],
            aten.view.dtype: [(square, torch.int16)],
            aten.as_strided.default: [(tensor, (2, 2), (8, 1), 3)],
            aten.slice.Tensor: [(tensor, 0, 1, 3), (narrow, 1, 2, 2)],
            aten.transpose.int: [(tensor, 0, 1), (narrow, 0, 3)],
            aten.permute.default: [(tensor, (1, 0)), (narrow, (3, 2, 1, 0))],
            aten.expand.default: [(tensor[:1], (3, 4))],
            aten.unsqueeze.default: [(tensor, 1), (narrow, 0)],
        }
        found = []
        for view in sorted(VIEWS, key=str):
            for args in told.get(view, [(tensor,)]):
                seen = view(*args)
                same = seen.untyped_storage()._cdata == args[0].untyped_storage()._cdata
                found.append(
                    (str(view), seen.shape, seen.stride(), seen.storage_offset(), seen.dtype, seen.device, same)
                )
    return found


def test_views_are_as_torch_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    torchs, given, direct = looked_at(FakeTensorMode()), [], Fakes._view
    monkeypatch.setattr(Fakes, "_view", lambda mode, *call: given.append(str(call[0])) or direct(mode, *call))
    assert looked_at(Fakes()) == torchs and all(row[-1] for row in torchs)
    assert {str(view) for view in VIEWS} <= set(given), "none went another way"


def test_what_cannot_be_seen_so_is_refused_as_torch_does() -> None:
    for mode in (Fakes(), FakeTensorMode()):
        with mode, pytest.raises(ValueError, match="Cannot view"):
            torch.empty(4, 4).t().view(16)


def test_gradients_pass_views() -> None:
    with Fakes():
        weight = torch.nn.Parameter(torch.empty(4, 6))
        rows = torch.empty(3, 6, requires_grad=True)
        (rows @ weight.t())[1:].transpose(0, 1).sum().backward()
        assert weight.grad is not None and weight.grad.shape == weight.shape and not weight.detach().requires_grad
