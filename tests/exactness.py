"""A plain PyTorch loop with Outsize's precision policy, and a job beside it on the same weights and batches.

What the tests of training compare against. The plain loop keeps everything in memory and knows nothing of blocks: fp32
masters in one ordinary optimizer, a module that computes in the precision's dtype, gradients turned into fp32 before they
are added up or measured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from models import FAMILIES, tiny_model
from torch import nn
from torch.nn import functional

from outsize.distributed.group import Group
from outsize.distributed.shard import ShardedStore
from outsize.memory.codec import split_master
from outsize.memory.device import DeviceTier
from outsize.memory.disk import DiskTier
from outsize.memory.host import HostTier, allocate_slab
from outsize.memory.tier import Tier, pages
from outsize.memory.transfer import Transfers
from outsize.model.units import find_units, parts_of
from outsize.plan import KEEP, KEEP_ATTENTION, MOVE, MOVE_TO_HOST, RECOMPUTE, Activations, Plan
from outsize.train.job import Job, bind
from outsize.train.optimizers import OptimizerRule

VOCABULARY = 256
ACTIVATIONS = 256 << 10  # bytes near for those of a unit that are on their way; less than a step's
DEVICE = 1 << 30  # bytes of what stands for a device
ACTIVATIONS_OF = {
    "keep": KEEP,
    "recompute": RECOMPUTE,
    "attention": KEEP_ATTENTION,
    "move": MOVE,
    "move to host": MOVE_TO_HOST,
    "mixed": (
        Activations("products", "disk"),
        Activations("input", "disk"),
        Activations("attention", "disk"),
        MOVE_TO_HOST,
        Activations("products"),
        KEEP,
        RECOMPUTE,
    ),
}
Batch = dict[str, torch.Tensor]


# -- models and data ---------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """A block that no library has: one matrix used twice, a scalar, a frozen weight, a bias, a norm."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.mix = nn.Linear(hidden, hidden, bias=False)
        self.out = nn.Linear(hidden, hidden)
        self.strength = nn.Parameter(torch.tensor(0.5))
        self.fixed = nn.Parameter(torch.rand(hidden), requires_grad=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        mixed = torch.tanh(self.mix(self.norm(states))) * self.fixed.to(states.dtype)
        mixed = self.mix(mixed.cumsum(1) / states.shape[1])
        return states + self.dropout(self.out(mixed)) * self.strength


class HandWritten(nn.Module):
    """A causal model outside transformers, whose top module owns a weight of its own."""

    def __init__(self, tied: bool, hidden: int = 64, layers: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, hidden)
        self.places = nn.Parameter(0.02 * torch.randn(64, hidden))
        self.blocks = nn.ModuleList(Mixer(hidden, dropout) for _ in range(layers))
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        states = self.tokens(input_ids) + self.places[: input_ids.shape[1]]
        for block in self.blocks:
            states = block(states)
        logits = self.head(states).float()
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


KINDS_OF_MODEL = (*(family for family in FAMILIES if family != "phi3"), "handwritten")


def make_model(family: str, tied: bool = True, layers: int = 4, hidden: int = 64) -> nn.Module:
    """A tiny fp32 model in training mode, the same at every call."""
    if family != "handwritten":
        layers = layers // 2 if family == "t5" else layers  # of which it has two stacks
        return tiny_model(family, tied, layers=layers, hidden=hidden, vocabulary=VOCABULARY)  # pyright: ignore[reportArgumentType]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return HandWritten(tied).train()


def make_batches(steps: int, accumulate: int, sequences: int = 2, length: int = 16, seed: int = 1) -> list[list[Batch]]:
    """Random tokens; in each micro-batch another number of them is learnt."""
    generator = torch.Generator().manual_seed(seed)

    def batch(index: int) -> Batch:
        ids = torch.randint(3, VOCABULARY, (sequences, length), generator=generator)
        labels = ids.clone()
        labels[0, : 3 * index % 15] = -100
        return {"input_ids": ids, "labels": labels}

    return [[batch(index) for index in range(accumulate)] for _ in range(steps)]


# -- an optimizer that shows gradients ---------------------------------------------------------------------------------


class Remember(torch.optim.Optimizer):
    """Gradient descent that keeps the gradient it was given as its state, where a test can look at it."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["gradient"] = parameter.grad.clone()
                    parameter.add_(parameter.grad, alpha=-group["lr"])


# -- the plain loop ----------------------------------------------------------------------------------------------------


class PlainLoop:
    """What Outsize must equal. `model` is trained in place; `masters` are its fp32 weights by name."""

    def __init__(
        self, model: nn.Module, rule: OptimizerRule, precision: str = "fp32", clip: float | None = None
    ) -> None:
        self.model, self.precision, self.clip = model, precision, clip
        self.parameters = dict(model.named_parameters())
        trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self.masters = {name: p.detach().clone() for name, p in trained.items()}
        self.optimizers = self._optimizers(rule)
        self.show()

    def _optimizers(self, rule: OptimizerRule) -> list[torch.optim.Optimizer]:
        """One ordinary optimizer over all the weights that the rule gives the same class and options."""
        kinds: list[tuple[Any, list[torch.Tensor]]] = []
        for name, master in self.masters.items():
            choice = rule(name, self.parameters[name])
            same = next((masters for known, masters in kinds if known == choice), None)
            if same is None:
                kinds.append((choice, same := []))
            same.append(master)
        optimizers = [cls(masters, **options) for (cls, options), masters in kinds]
        for optimizer in optimizers:
            getattr(optimizer, "train", lambda: None)()
        return optimizers

    def show(self) -> None:
        """Let the module compute with what the masters are now."""
        for name, master in self.masters.items():
            shown = master
            if self.precision == "mixed":
                shown = torch.empty(master.shape, dtype=torch.bfloat16)
                split_master(master.clone().view(-1), shown.view(-1), None)
            self.parameters[name].data = shown

    def take_gradients(self) -> None:
        """Add what backward has left on the module to the masters' gradients, in fp32."""
        for name, master in self.masters.items():
            parameter = self.parameters[name]
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                master.grad = gradient.float() if master.grad is None else master.grad + gradient

    def update(self) -> float | None:
        norm = None
        if self.clip is not None:
            norm = float(nn.utils.clip_grad_norm_(list(self.masters.values()), self.clip))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.show()
        return norm

    def step(self, micro_batches: list[Batch]) -> float:
        """One step as anyone would write it: each micro-batch's loss weighs as many tokens as it learns."""
        learnt = [self._learnt(batch["labels"]) for batch in micro_batches]
        total = 0.0
        for batch, count in zip(micro_batches, learnt, strict=True):
            loss = self.model(**batch).loss
            if len(micro_batches) > 1:
                loss = loss * (count / sum(learnt))
            loss.backward()
            self.take_gradients()
            total = total + loss.detach()
        self.update()
        return float(total)

    def _learnt(self, labels: torch.Tensor) -> int:
        shifted = not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        return int((labels[:, 1:] if shifted else labels).ne(-100).sum())


# -- the job beside it -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """How a job is placed and run; `placement` is near, disk, mixed, or device: near, in its host's memory (a third
    of which is updated there) and on disk."""

    precision: str = "fp32"
    placement: str = "disk"
    accumulate: int = 1
    hold: bool = False
    clip: float | None = None
    activations: Activations | tuple[Activations, ...] = RECOMPUTE
    """Several: the units take them in turn."""
    gradient_home: str = "disk"
    table_rows: int | None = None
    moments: str = "fp32"
    arena: int | None = None
    parts: bool = False
    """Modules of layers are leased one after the other, small ones too."""


def make_plan(model: nn.Module, setting: Setting) -> Plan:
    names = [name for name, _ in model.named_parameters()]
    weights, states = {
        "near": (names, names),
        "disk": ([], []),
        "mixed": (names[::3], names[1::3]),
        "device": (names[::3], []),
    }[setting.placement]
    on_device = setting.placement == "device"
    on_host = [name for index, name in enumerate(names) if index % 3 < 2] if on_device else []
    tables = table_names(model) if setting.table_rows else []
    return Plan(
        precision=setting.precision,
        arena_bytes=setting.arena or small_arena(model, weights, states, setting),
        near_weights=frozenset(weights),
        near_states=frozenset(states),
        host_weights=frozenset(names[1::3] if on_device else []),
        host_states=frozenset(on_host),
        host_updates=frozenset(on_host[::3]),  # of weights that are near, and of such that are there
        device_bytes=DEVICE * on_device,
        gradient_home=setting.gradient_home,
        activations=choose(model, setting.activations),
        moved_tensor_bytes=1,
        parts=parts_of(find_units(model), ()) if setting.parts else (),
        table_rows=tuple((name, setting.table_rows) for name in tables if setting.table_rows),
        blocked_loss=bool(tables),
        accumulate=setting.accumulate,
        hold=setting.hold or setting.clip is not None,
        clip=setting.clip,
        moments=setting.moments,
    )


def choose(model: nn.Module, wanted: Activations | tuple[Activations, ...]) -> tuple[tuple[str, Activations], ...]:
    repeated = [unit.name for unit in find_units(model) if unit.repeated]
    return tuple(zip(repeated, cycle(in_turn(wanted)), strict=False))


def in_turn(wanted: Activations | tuple[Activations, ...]) -> tuple[Activations, ...]:
    return wanted if isinstance(wanted, tuple) else (wanted,)


def table_names(model: nn.Module) -> list[str]:
    """The embedding's and the head's weight; one name when they are tied."""
    users = (model.get_input_embeddings(), model.get_output_embeddings())  # pyright: ignore[reportCallIssue]
    return [name for name, p in model.named_parameters() if any(p is user.weight for user in users)]


def small_arena(model: nn.Module, near_weights: list[str], near_states: list[str], setting: Setting) -> int:
    """What streams of the largest unit, with its gradients if these are added up, and half as much again, because the
    room that pinned blocks leave is in pieces; and three times the most that one weight's gradient and state take. Less
    than a step touches, so that blocks come and go."""

    def largest(near: list[str]) -> int:
        units = (unit.parameters for unit in find_units(model) if not unit.encloses)
        return max(sum(pages(4 * p.numel()) for name, p in unit if name not in near) for unit in units)

    unit = largest(near_weights) + (largest([]) if setting.accumulate > 1 else 0)
    weights = dict(model.named_parameters()).items()
    gradient = max(4 * p.numel() for _, p in weights)
    state = max((12 * p.numel() for name, p in weights if name not in near_states), default=0)
    return pages(int(1.5 * unit) + 3 * max(gradient, state)) + (ACTIVATIONS if moves(setting) else 0)


def moves(setting: Setting) -> bool:
    """Activations of some unit wait on disk, or in a device's host's memory."""
    return any(activations.home in ("disk", "host") for activations in in_turn(setting.activations))


def make_job(model: nn.Module, rule: OptimizerRule, setting: Setting, directory: Path) -> Job:
    """Bind `model` to a new store under `directory`. Its own numbers are gone afterwards: compare with a copy."""
    return bind_job(model, rule, make_plan(model, setting), directory)


def bind_job(
    model: nn.Module,
    rule: OptimizerRule,
    plan: Plan,
    directory: Path,
    group: Group | None = None,
    sources: dict[str, torch.Tensor] | None = None,
) -> Job:
    """`sources`: the weights of a model that has none itself."""
    sources = sources or {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tiers: dict[str, Tier] = {"host": HostTier(1 << 30), "disk": DiskTier(directory / "blocks", 1 << 30)}
    if plan.device_bytes:
        tiers["device"] = DeviceTier(plan.device_bytes, torch.device("cpu"))
    row, ahead = (group or Group()).row(plan.sharers), plan.gather_ahead_bytes
    store = ShardedStore(row, tiers, plan.arena_bytes, allocate_slab, Transfers(), plan.near, ahead=ahead)

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        return sources[name][start:stop] if sources[name].dim() else sources[name]

    return bind(model, find_units(model), plan, rule, store, read, torch.device("cpu"), group=group)


@dataclass
class Pair:
    """A plain loop and a job that began with the same weights."""

    plain: PlainLoop
    job: Job
    losses: list[tuple[float, float]] = field(default_factory=list)

    def step(self, micro_batches: list[Batch]) -> None:
        self.losses.append((self.plain.step(micro_batches), self.job.train_step(micro_batches).loss))

    def assert_equal(self) -> None:
        """Losses, masters and what the module computes with: the same bits."""
        assert [job for _, job in self.losses] == [plain for plain, _ in self.losses]
        assert_same_weights(self.job, self.plain)


def make_pair(
    family: str,
    tied: bool,
    rule: OptimizerRule,
    setting: Setting,
    directory: Path,
    prepare: Callable[[nn.Module], Any] = id,
    loop: type[PlainLoop] = PlainLoop,
) -> Pair:
    """Both sides on `make_model(family, tied)`; `prepare` changes the model before either sees it."""
    model = make_model(family, tied)
    prepare(model)
    plain = loop(copy.deepcopy(model), rule, setting.precision, setting.clip)
    return Pair(plain, make_job(model, rule, setting, directory))


def assert_same_weights(job: Job, plain: PlainLoop) -> None:
    """Finishes what is due in the job; leaves its store idle and checked."""
    job.flush()
    for name, master in plain.masters.items():
        rows = master.shape[0] if master.dim() else 1
        assert torch.equal(job.read(name, 0, rows, master=True), master), f"master of {name}"
        assert torch.equal(job.read(name, 0, rows), plain.parameters[name]), f"compute copy of {name}"


def assert_idle(job: Job) -> None:
    """Every byte is where the store says, and nothing but resident weights is leased."""
    for lease in job.attachment._resident.values():
        lease.release()
    job.attachment._resident.clear()
    job.store.flush()
    job.store.check()
    job.store.close()


def read_gradients(job: Job) -> dict[str, torch.Tensor]:
    """The last step's gradients, from the state of `Remember`."""
    job.flush()
    found = {}
    for weight in job.weights.values():
        for chunk in job.updater.chunks.get(weight.blocks[0].name, []):
            if "gradient" in chunk.scalars:  # of one element: not worth a block
                found[weight.name] = chunk.scalars["gradient"].clone()
                continue
            with job.store.lease(chunk.state) as lease:
                found[weight.name] = lease.tensors["state.gradient"].clone()
    return found
