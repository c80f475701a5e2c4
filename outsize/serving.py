"""What a user calls to serve a model: `Engine`, which opens, plans and runs it within a budget."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version as outsize_version
from pathlib import Path
from typing import Any

import torch

from outsize.asked import ServeRequest
from outsize.distributed.group import Group
from outsize.distributed.relay import Relay, Ring
from outsize.errors import OptionError, RunError, StorageError
from outsize.machine.allocator import compile_few_kernels, recycle_up_to
from outsize.machine.describe import describe, process_memory
from outsize.machine.garbage import lasting
from outsize.machine.machine import Machine
from outsize.machine.threads import dismiss_helpers
from outsize.memory.disk import DiskTier
from outsize.memory.host import HostTier, allocate_slab
from outsize.memory.store import Store
from outsize.memory.tier import Tier
from outsize.memory.transfer import Transfers
from outsize.model.fingerprint import Summed, fingerprint_model, fingerprint_weights
from outsize.model.load import ModelSource, open_model
from outsize.model.route import Leg
from outsize.model.units import find_units
from outsize.plan import STORED, Plan
from outsize.planner.serving import plan_serving
from outsize.planner.serving_forecast import with_forecast
from outsize.planner.serving_workers import (
    baseline_of,
    pages_of,
    plan_leg,
    plan_together,
    room_of,
    with_fewest,
)
from outsize.planner.training import Place
from outsize.serve.attention import use_paged_attention
from outsize.serve.engine import Engine as StepEngine
from outsize.serve.far_index import FarIndex
from outsize.serve.request import Sampling
from outsize.serve.rounded import ROUNDINGS, Read, stored_names, use_rounded
from outsize.serve.runner import Runner
from outsize.serve.schedule import POLICIES
from outsize.serve.service import Completion, Service
from outsize.serve.weights import bind_for_inference
from outsize.sizes import parse_size
from outsize.train.job import users_of

__all__ = ["Completion", "Engine", "Sampling"]


class Engine(Service):
    """Serves the model at `model` (folder, .gguf file or hub id) within `memory`: `generate`, `stream`, `astream`.

    `context` tokens of prompt and answer at most, `concurrency` sequences in one step of up to `step_tokens` tokens, who get
    memory before weights do (None: 32, where there is room to spare); `weights` "int8" or "int4" holds those of linear layers
    in 8 or 4 bits (approximate), else they are as stored; `policy` is one of fcfs, feedback, fair, priority.
    Keys and values without a place in memory go to `scratch`, or to `kv_directory`, where another engine over the same
    weights finds them again. `plan` says what was decided. Of a `group` of several workers this is the first; the others
    `follow`. Close it, or use it in a `with` statement.

    Raises BudgetError when the memory does not do, ModelError when the model cannot be read or served, OptionError for a
    bad option."""

    def __init__(
        self,
        model: str,
        *,
        memory: str | int | None = None,
        context: int | None = None,
        concurrency: int | None = None,
        step_tokens: int = 512,
        weights: str = STORED,
        policy: str = "fcfs",
        scratch: str | Path | None = None,
        kv_directory: str | Path | None = None,
        group: Group | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise OptionError(f"There is no policy {policy!r}; there are {', '.join(POLICIES)}.")
        part = Part(group or Group(), model, memory, context, concurrency, step_tokens, weights, scratch, kv_directory)
        self.plan = part.plan
        engine = StepEngine(part.runner, POLICIES[policy](), end_tokens(part.module), part.tokenizer)
        super().__init__(engine, part.identity, part.close)
        part.group.on_end(lambda said: self.give_up(RunError(said)))


class Part:
    """What one worker of `group` needs to serve: `plan`, and the `runner` over its weights. The first one's engine has it
    run, and the others `follow`. Options are those of `Engine`, which raises as this does."""

    def __init__(
        self,
        group: Group,
        model: str,
        memory: str | int | None = None,
        context: int | None = None,
        concurrency: int | None = None,
        step_tokens: int = 512,
        weights: str = STORED,
        scratch: str | Path | None = None,
        kv_directory: str | Path | None = None,
    ) -> None:
        self.group = group
        limit = parse_size(memory) if memory is not None else _free_memory() // group.here
        request = ServeRequest(limit, context, concurrency, step_tokens, weights)
        compile_few_kernels()
        self.source, self.module, self._read, self.tokenizer = _opened(model, weights)
        facts = [] if weights == STORED else [weights]
        names = stored_names(self.module)
        self.identity = fingerprint_weights(self.source.config, names, self.source.read, *facts)
        if group.size > 1:
            version = f"{outsize_version('outsize')} on torch {torch.__version__}"
            asked = {**vars(replace(request, memory_bytes=0)), "kv_directory": kv_directory is not None}
            group.agree({"version": version, "model": self.identity, **asked})
        with ExitStack() as stack:
            with _scratch(scratch) as folder:
                free = min(describe(place).disk_free_bytes for place in (folder, kv_directory or folder)) // group.here
                # Open, the file outlives its name, and goes with the process, however that ends.
                tiers: dict[str, Tier] = {"host": HostTier(limit), "disk": DiskTier(Path(folder) / "blocks")}
            self.plan, self.leg = self._planned(group, request, free)
            self.runner = self._runner(stack, group, tiers, kv_directory)
            self.close = stack.pop_all().close
        group.each(0)  # nobody is asked before all are there
        dismiss_helpers()  # the engine computes in a thread of its own, with its own

    def _planned(self, group: Group, request: ServeRequest, disk_free_bytes: int) -> tuple[Plan, Leg | None]:
        """This worker's plan; how many pages there are is for those who have room for the fewest."""
        module, rank = self.module, group.rank
        baseline = baseline_of(module, process_memory().resident_bytes, rank)
        if group.size == 1:
            return plan_serving(module, find_units(module), request, baseline, disk_free_bytes), None
        rooms = group.tell(room_of(module, request, baseline))
        plan, leg = plan_leg(module, request, baseline, disk_free_bytes, rooms, rank)
        return with_fewest(plan, group.tell(pages_of(plan))), leg

    def _runner(
        self, stack: ExitStack, group: Group, tiers: dict[str, Tier], kv_directory: str | Path | None
    ) -> Runner:
        plan, module, leg = self.plan, self.module, self.leg
        assert plan.serving is not None
        recycle_up_to(0)  # of weights that come in, none leaves a hole for others to spread over
        store = Store(tiers, plan.arena_bytes, allocate_slab, Transfers(), ledger=group.ledger)
        stack.callback(store.close)
        summed = Summed(self._read)
        read = self._read if kv_directory is None else summed.read
        units = [unit for unit in find_units(module) if leg is None or leg.has(unit.name)]
        attachment = bind_for_inference(module, units, plan, store, read, lambda p: users_of(module, p))
        stack.callback(attachment.detach)
        recycle_up_to(plan.recycle_bytes)
        index, serving = None, plan.serving
        if kv_directory is not None:
            facts = (serving.layers, serving.page_bytes, *([] if leg is None else [leg.span]))
            own = summed.digest(fingerprint_model(self.source.config), *facts)
            index = FarIndex(Path(kv_directory) / own, serving.far_pages)
            index.keep_common(group.tell(index.keys))
            tiers["kv"] = DiskTier(index.pages)
        relay = Ring(group) if group.size > 1 else Relay()
        return Runner(module, attachment, store, serving, leg, relay, index)


def follow(group: Group, model: str, **asked: Any) -> None:
    """Serve as another worker than the first, until that one ends. `asked` is what its engine was asked, `policy` apart.
    Raises as `Engine` does, and RunError when another worker is lost."""
    part = Part(group, model, **asked)
    try:
        part.runner.follow()
    finally:
        part.runner.close()
        part.close()


def _scratch(parent: str | Path | None) -> tempfile.TemporaryDirectory[str]:
    """A folder for what streams, gone with the engine."""
    try:
        return tempfile.TemporaryDirectory(prefix="outsize-", dir=parent)
    except OSError as problem:
        raise StorageError(f"{problem.filename}: no folder can be made there ({problem.strerror}).") from problem


def plan_service(
    model: str,
    *,
    machine: Machine,
    context: int | None = None,
    concurrency: int | None = None,
    step_tokens: int = 512,
    weights: str = STORED,
    workers: int = 1,
) -> Callable[[str | int], Plan]:
    """What `Engine`, or so many `workers` each within that much, would do with `model` within one memory after another,
    without doing it, and what requests would see on `machine`. `model` may be a folder that holds nothing but config.json.
    Raises as `Engine` does."""
    _, module, _, _tokenizer = _opened(model, weights)
    place = Place(machine, process_memory().resident_bytes, machine.capacity("disk"))

    def within(memory: str | int) -> Plan:
        request = ServeRequest(parse_size(memory), context, concurrency, step_tokens, weights)
        if workers > 1:
            return plan_together(module, request, place, workers)
        baseline = baseline_of(module, place.baseline_bytes)
        found = plan_serving(module, find_units(module), request, baseline, place.disk_free_bytes)
        return with_forecast(found, module, machine, place.prices)

    return within


def _opened(model: str, weights: str) -> tuple[ModelSource, Any, Read, Any]:
    """A model's files, its module without weights in the dtype of the files, or with linear layers in fewer bits, attending
    over pages; what reads its weights; and its tokenizer: all that is there when a plan asks what the process
    holds already."""
    with lasting():
        source = open_model(model)
        stored = source.config.dtype if isinstance(source.config.dtype, torch.dtype) else torch.bfloat16
        module = (source.build if source.files.has_weights else source.outline)(stored)
    use_paged_attention(module)
    read = use_rounded(module, weights, source.read) if weights in ROUNDINGS else source.read
    return source, module, read, source.tokenizer()


def end_tokens(module: Any) -> frozenset[int]:
    """The tokens that end a completion, as the model's generation configuration has them."""
    found = module.generation_config.eos_token_id
    return frozenset([] if found is None else [found] if isinstance(found, int) else found)


def _free_memory() -> int:
    return describe(Path.cwd()).memory_available_bytes + process_memory().resident_bytes
