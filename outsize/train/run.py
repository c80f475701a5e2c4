"""The loop of `outsize train`: steps, commits, evaluation, samples, metrics; then the model is written out."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from outsize.distributed.group import Group
from outsize.distributed.shares import in_proportion
from outsize.errors import OptionError, RunError
from outsize.machine.allocator import recycle_up_to
from outsize.machine.describe import process_memory
from outsize.machine.devices import peak_bytes
from outsize.memory.clock import Span
from outsize.memory.homes import Committed
from outsize.memory.transfer import Ticket
from outsize.model.companions import persistent_buffers
from outsize.model.export import read_along, write_safetensors
from outsize.train.counts import Counts, Ways
from outsize.train.data import PackedDataset, batches, in_order
from outsize.train.ending import ModuleLoss
from outsize.train.job import Job
from outsize.train.pace import Pace, Watch
from outsize.train.progress import Progress
from outsize.train.published import publish
from outsize.train.randomness import set_random_state
from outsize.train.report import Metrics, StepLine
from outsize.train.retention import Retention
from outsize.train.settings import TrainSettings
from outsize.train.state import StateFolder
from outsize.train.timeline import timeline


@dataclass(frozen=True)
class Schedule:
    """How long a run is, and when it stops to look at itself. Steps; 0 means never."""

    steps: int
    batch_size: int
    accumulate: int
    seed: int
    eval_every: int = 0
    sample_every: int = 0
    sample_prompt: str | None = None
    sample_tokens: int = 40

    @classmethod
    def of(cls, settings: TrainSettings) -> Schedule:
        return cls(
            settings.steps,
            settings.batch_size,
            settings.accumulate,
            settings.seed,
            settings.eval_every,
            settings.sample_every,
            settings.sample_prompt,
        )


class Run:
    """A job under way in a folder. `state` is committed every `commit_every` steps of the plan, and at the end."""

    def __init__(
        self,
        job: Job,
        state: StateFolder,
        metrics: Path,
        progress: Progress,
        tokenizer: Any = None,
        retention: Retention = Retention(),  # noqa: B008 - frozen
        about: dict[str, Any] | None = None,
    ) -> None:
        """`about` says in plain JSON what the run is; it stands in each manifest, and a state of another is refused."""
        self.job, self.state, self.progress, self.tokenizer = job, state, progress, tokenizer
        self.retention, self.about = retention, about or {}
        self.metrics_path = metrics
        self.metrics: Metrics | None = None
        self.moved: Ways = Counter()
        """What steps and their commits have moved; what is done `_apart` from them is not in it."""
        self._counted, self._elsewhere = Counts(), Counts()  # up to the last line; what was done apart
        predicted = job.plan.predicted
        self.watch = Watch(None if predicted is None else Pace.planned(predicted))
        self.stopping: Callable[[], bool] = lambda: False
        self._committed: Ticket | None = None
        self._last_commit = -1
        self._warm = False
        self._steady: tuple[float, float] | None = None  # when the last step that others followed began and ended
        job.on_complete = self._completed

    def recover(self) -> int:
        """Continue at the last committed step, or at a later one that a keeper holds; where none is, what the job holds is
        the first to be committed. Returns the number of steps done.

        Raises RunError when the state is not that of this run."""
        manifest = self.state.read()
        if manifest is None:
            self.state.write_layout(self.job.store)
            self.commit(self.job.step_number, wait=True)
            self._publish(self.job.step_number)
            return self.job.step_number
        self.state.check_layout(self.job.store)
        found = self.state.published
        step, facts = (manifest.step, manifest.facts) if found is None else (found.step, found.facts)
        self._restore(step, facts)
        self._last_commit = manifest.step
        if found is not None and found.memory is not self.job.store.shared:  # this plan has its state elsewhere
            if found.step > manifest.step:
                found.bring(manifest.layout, self.job.store)
                self.commit(step, wait=True)
            found.give_up()
        self._publish(step)
        return step

    def _restore(self, step: int, facts: dict[str, Any]) -> None:
        known = facts["about"]
        for what, value in self.about.items():
            if known.get(what) != value:
                raise RunError(
                    f"{self.state.directory} holds the state of another {what}. Use the one that the run began with, "
                    "or another --out."
                )
        before, now = facts.get("near", "host"), self.job.plan.near
        if before != now:
            self.progress.message(
                f"until step {step} the {before} computed; from here the {now} does, and rounds otherwise"
            )
        self.job.updater.restore(facts["optimizer"])
        self.job.step_number = step
        self.job.random_state = torch.frombuffer(bytearray(base64.b64decode(facts["random"])), dtype=torch.uint8)
        set_random_state(self.job.random_state, self.job.device)

    def _facts(self) -> dict[str, Any]:
        """What a step is besides its blocks' bytes, in plain JSON."""
        return {
            "about": self.about,
            "optimizer": self.job.updater.facts(),
            "near": self.job.plan.near,
            "nodes": self.job.plan.nodes,
            "close": self.job.plan.close,
            "weight_copies": self.job.plan.weight_copies,
            "sequences": self.job.plan.sequences,
            "shares": self.job.plan.shares,
            "legs": self.job.plan.legs,
            "legs_shape": self.job.plan.legs_shape,
            "shapes": {weight.name: weight.shape for weight in self.job.weights.values() if weight.blocks[0].split},
            "random": base64.b64encode(bytes(self.job.random_state.tolist())).decode(),
        }

    def _publish(self, step: int) -> None:
        """The blocks hold `step`: where they lie in shared memory, a crash of this process loses nothing of it."""
        if self.job.store.shared is not None:
            publish(self.job.store.shared, self.state.layout(), step, self._facts())

    def commit(self, step: int, wait: bool = False) -> None:
        """Make `step` durable while the next one begins; a failure shows at the next commit at the latest."""
        if step == self._last_commit:
            return
        facts = self._facts()
        asked = self.state.keep_asked()
        keep, drop = self.retention.choose(step, self.state.kept_names(), asked)

        def write(places: dict[str, Committed]) -> None:
            if self.metrics is not None:
                self.metrics.sync()  # a committed step's line must not be lost: nobody writes it again
            self.state.write_manifest(step, places, facts, keep, drop)
            self.job.group.all_have()  # until then nobody may write over the step before
            if asked:
                self.state.keep_answered()

        store, started = self.job.store, self.job.store.clock.now()
        self._committed = store.commit(write, wait, keep, drop)
        store.waiting_seconds["write"] += store.clock.note("waiting", started)  # for the commit before
        self._last_commit = step

    def _completed(self, step: int) -> None:
        """A held update is complete in the middle of the next step; otherwise the step's line is written first."""
        if self.job.plan.hold:
            self._complete(step)

    def _complete(self, step: int) -> None:
        """Everything is that of `step`: publish it, and commit it if that is due."""
        self._publish(step)
        self._commit_if_due(step)

    def _commit_if_due(self, step: int) -> None:
        if step % self.job.plan.commit_every == 0 or self.retention.is_kept(step) or self.state.keep_asked():
            self.commit(step)

    def train(
        self,
        data: PackedDataset,
        schedule: Schedule,
        scheduler: Any,
        evaluation: PackedDataset | None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Steps from where the state stands to `schedule.steps`, or until `stopping`; the last one done is committed."""
        self.stopping = stopping
        first = self.job.step_number
        metrics = self.metrics = Metrics(self.metrics_path, first)
        group, count = self.job.updater.group, schedule.batch_size * schedule.accumulate
        sequences = self.job.plan.sequences or in_proportion(count, [1.0] * group.size)
        mine = range(sum(sequences[: group.rank]), sum(sequences[: group.rank + 1]))
        source = batches(data, schedule.batch_size, schedule.seed, first, schedule.accumulate, mine)
        self._commit_if_due(first)  # a keeper may have held it when the process was killed before its commit
        before = self._counted = self._counts()
        if first and not metrics.has_evaluation(first):  # killed between that step's commit and its evaluation
            self._evaluate_if_due(metrics, first, schedule, evaluation)
        for step in takewhile(lambda step: not stopping(), range(first + 1, schedule.steps + 1)):
            last = step == schedule.steps
            line = self._step(step, next(source), scheduler, again=not last)
            metrics.append(line)
            if not self.job.plan.hold:
                self._complete(step)
            self.progress.step(line)
            if not last and self.watch.look(self.timeline()):
                self.progress.message(str(self.watch.behind))
            self._evaluate_if_due(metrics, step, schedule, evaluation)
            due = schedule.sample_every and (step % schedule.sample_every == 0 or last)
            if schedule.sample_prompt and due and not stopping():
                self.progress.message(f"sample: {self._sample(schedule)}")
        self.finish()
        self.moved = (self._counts() - before).moved
        metrics.close()
        self.metrics = None

    def finish(self) -> None:
        """Apply and commit whatever is still due, and wait for it; nobody needs a keeper any more."""
        self.job.flush()
        self.job.store.flush()
        self.commit(self.job.step_number, wait=True)
        if self._committed is not None:
            self._committed.wait()
        if self.job.store.shared is not None:
            self.job.store.shared.dismiss()

    def _step(self, step: int, micro_batches: list[dict[str, torch.Tensor]], scheduler: Any, again: bool) -> StepLine:
        job, rate = self.job, scheduler.get_last_lr()[0]
        started = job.store.clock.now()
        # Optimizers make their state in their first step: allocations that must not be kept for reuse, if they are large.
        recycle_up_to(job.plan.recycle_bytes if self._warm or job.updater.by_pieces else 0)
        self._warm = True
        result = job.train_step(micro_batches, again)
        after = self._counts()
        if again:
            self._steady = started, job.store.clock.now()
        scheduler.step()
        spent, self._counted = after - self._counted, after
        return StepLine(
            step=step,
            loss=result.loss,
            lr=rate,
            gradient_norm=result.norm,
            seconds=spent.passed,
            tokens=result.tokens,
            bytes_read=spent.bytes_read,
            bytes_written=spent.bytes_written,
            host_peak_bytes=process_memory().peak_bytes,
            device_peak_bytes=peak_bytes(job.device),
            read_wait_seconds=spent.read_wait,
            write_wait_seconds=spent.write_wait,
            update_seconds=spent.update,
            wire_bytes=spent.wire_bytes,
            wire_wait_seconds=spent.wire_wait,
        )

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """What is done meanwhile is no step's. What a step still has to do, a held update for one, is done before."""
        self.job.flush()
        before = Counts.of(self.job)
        yield
        self._elsewhere += Counts.of(self.job) - before

    def _counts(self) -> Counts:
        return Counts.of(self.job) - self._elsewhere

    def timeline(self) -> tuple[Span, ...]:
        """What the last step that another followed did when; nothing if there was none."""
        noted = [*self.job.store.clock.noted, *self.job.group.clock.noted]
        return () if self._steady is None else timeline(noted, *self._steady)

    def _evaluate_if_due(
        self, metrics: Metrics, step: int, schedule: Schedule, evaluation: PackedDataset | None
    ) -> None:
        every = schedule.eval_every
        if evaluation is None or not every or (step % every and step != schedule.steps):
            return
        looked_at = takewhile(lambda batch: not self.stopping(), in_order(evaluation, schedule.batch_size))
        with self._apart():
            loss = self.job.evaluate(looked_at)
        if self.stopping():  # the run evaluates when it continues
            return
        metrics.append_evaluation(step, loss)
        self.progress.evaluation(step, loss)

    def _sample(self, schedule: Schedule) -> str:
        inputs = self.job.bring(dict(self.tokenizer(schedule.sample_prompt, return_tensors="pt")))
        traversal = self.job.attachment.call_by_call("sample")
        with self._apart(), self.job.evaluation_mode(), traversal, torch.no_grad():
            generated = self.job.model.generate(  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
                **inputs, max_new_tokens=schedule.sample_tokens, do_sample=False
            )
        return self.tokenizer.decode(generated[0], skip_special_tokens=True)


def check_loss(job: Job, data: PackedDataset) -> None:
    """Families scale or cap their logits: compare the blocked loss with the module's own on a few tokens."""
    batch = {name: value[:, :16] for name, value in data.batch([0]).items()}
    batch["labels"] = batch["input_ids"].clone()
    blocked = job.evaluate(iter([batch]))
    with torch.no_grad(), job.evaluation_mode(), job.attachment.traversal():
        own = job.course.evaluate(job.bring(batch), ModuleLoss(job.model))
    tolerance = 2 * torch.finfo(next(iter(job.weights.values())).dtype).eps * max(abs(own), 1.0)
    if abs(own - blocked) > tolerance:
        raise OptionError(
            f"{type(job.model).__name__} does more to its logits than its head's weights say: loss {own:.6f} by the "
            f"module, {blocked:.6f} over blocks of the vocabulary. Use --loss module."
        )


def export(job: Job, directory: Path) -> None:
    """Write the job's weights, in the dtype they compute in, and its persistent buffers, as safetensors. Of several workers
    the first one writes, and all read along, as what is split comes from everyone, and other workers' legs from those."""
    buffers = persistent_buffers(job.model)
    own = {name: (weight.shape, weight.dtype) for name, weight in job.weights.items()}
    own |= {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in buffers.items()}
    specs, owners = {}, {}
    for rank, theirs in enumerate(job.group.tell(own)):
        for name, spec in theirs.items():
            owners.setdefault(name, rank)
            specs.setdefault(name, spec)
    specs = {name: specs[name] for name in in_order_of(job.model, specs)}

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        if name in buffers:
            rows = buffers[name][start:stop].cpu()
        elif name in own:
            rows = job.read(name, start, stop)
        else:
            shape, dtype = specs[name]
            rows = torch.empty((stop - start, *shape[1:]) if shape else (), dtype=dtype)
        return _brought(job.group, rows, owners[name])

    with job.evaluation_mode():
        if job.group.rank == 0:
            write_safetensors(directory, specs, read)
        else:
            read_along(specs, read)
        job.group.each(0)


def in_order_of(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Of parameters and buffers, as `model` defines them; those of a module that is not here as they come."""
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}

    def place(name: str) -> int:
        while name not in places:
            name = name.rpartition(".")[0]
        return places[name]

    return sorted(names, key=place)


def _brought(group: Group, rows: torch.Tensor, owner: int) -> torch.Tensor:
    """On the first worker, what `owner` has there."""
    if owner != 0 and group.rank == 0:
        return group.take(owner, rows, "weight")
    if owner != 0 and group.rank == owner:
        group.pass_on(0, rows.contiguous(), "weight")()
    return rows
