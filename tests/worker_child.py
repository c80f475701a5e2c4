"""The process that tests/workers.py starts: a worker for each line of its input, times as many as that says, is forked."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from exactness import ACTIVATIONS_OF, Setting, bind_job, make_batches, make_model, make_plan
from models import tiny_model
from serving import ask, bound_model, run
from torch import nn
from workers import Case

from outsize.commands.serving_options import joined
from outsize.distributed.arrangement import PEER
from outsize.distributed.launch import LISTENING
from outsize.distributed.measure import measure_crowd
from outsize.distributed.workers import find_group
from outsize.model.route import keep_legs, shared_with_head
from outsize.model.units import find_units
from outsize.plan import Plan
from outsize.planner.legs import find_route
from outsize.serve.engine import Engine
from outsize.train.job import Job, always_near
from outsize.train.optimizers import OptimizerRule, default_rule
from outsize.train.precision import find_precision


def serve() -> None:
    for library in (
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "peft",
    ):  # imports that the workers then have
        import_module(library)
    for family in ("llama", "qwen3"):
        find_route(make_model(family))
    for line in sys.stdin:
        told = json.loads(line)
        if "family" in told["told"]:
            make_model(told["told"]["family"])
        with socket.create_server(("127.0.0.1", 0)) as listening:
            pids = [_fork(rank, told, listening) for rank in range(told["workers"])]
        if (kill := told["told"].get("kill")) is not None:
            _strike(pids[kill["rank"]], Path(told["told"]["settings"]["out"]) / "metrics.jsonl", kill)
        codes = dict(_wait(pids, stopped=kill is not None and kill["signal"] == "SIGSTOP"))
        print(json.dumps([os.waitstatus_to_exitcode(codes[pid]) for pid in pids]), flush=True)


def _strike(pid: int, metrics: Path, kill: dict[str, Any]) -> None:
    """Send the signal when so many steps are done, or after a time; too late is not at all."""
    end = time.monotonic() + kill.get("after", 150)
    while time.monotonic() < end and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if "line" in kill and metrics.exists() and metrics.read_bytes().count(b"\n") >= kill["line"]:
            break
        time.sleep(0.002)
    os.kill(pid, getattr(signal, kill["signal"]))


def _wait(pids: list[int], stopped: bool) -> Iterator[tuple[int, int]]:
    """How each ended; one that was stopped is killed when the others are gone."""
    left = set(pids)
    while left:
        pid, status = os.wait()
        left.discard(pid)
        yield pid, status
        if stopped and len(left) == 1:
            os.kill(min(left), signal.SIGKILL)


def _fork(rank: int, told: dict[str, Any], listening: socket.socket) -> int:
    """As the launcher does it, who has taken the port of the meeting point for the first worker."""
    pid = os.fork()
    if pid:
        return pid
    folder, size = Path(told["folder"]), told["workers"]
    log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if size > 1:
        here = size // told["told"].get("nodes", 1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank % here), LOCAL_WORLD_SIZE=str(here))
        host, port = listening.getsockname()
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port), LISTENING: str(listening.fileno())}
        if rank:
            listening.close()
    signal.alarm(500)  # a worker that waits for ever must not hold up the others' tests
    code = 0
    try:
        DO[told["do"]](folder, told["told"])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def optimizer(name: str) -> OptimizerRule:
    return default_rule(name, {"lr": 0.05 if name == "sgd" else 0.01})


def sharers(case: Case) -> int:
    """Workers that divide a step's sequences, and state."""
    return max(case.workers // max(len(case.legs), 1), 1)


def plan_of(model: nn.Module, case: Case) -> Plan:
    micro_batches = -(-case.sequences // (sharers(case) * case.batch))
    setting = Setting(
        case.precision,
        case.placement,
        accumulate=micro_batches,
        clip=case.clip,
        table_rows=case.table_rows,
        activations=ACTIVATIONS_OF[case.activations],
        parts=case.by_parts,
    )
    plan = make_plan(model, setting)
    if case.workers == 1:
        return plan
    told = {"legs": tuple(case.legs), "legs_shape": case.legs_shape, "schedule": case.schedule}
    plan = replace(plan, workers=case.workers, **told)
    if sharers(case) == 1:
        return plan
    whole = {name for name, _ in plan.table_rows} | always_near(find_units(model))
    large = {name for name, p in model.named_parameters() if p.numel() > case.split and name not in whole}
    split = frozenset(large) if case.zero == 3 else frozenset()
    return replace(
        plan,
        nodes=case.nodes,
        close=case.close,
        zero=case.zero,
        split_weights=split,
        weight_copies=case.copies,
        gather_ahead_bytes=case.ahead,
        shares=tuple(case.parts),
        arena_bytes=2 * plan.arena_bytes + (1 << 20),
    )


def in_line(model: nn.Module, plan: Plan, rank: int) -> Plan:
    """Leave of the model, and of the plan, what this worker has."""
    route, plan = find_route(model), replace(plan, rank=rank)
    legs = route.legs_to_train(plan.legs, plan.own_legs, shared_with_head(model, route))
    keep_legs(model, legs, find_precision(plan.precision).compute)
    own = dict(model.named_parameters())
    return replace(
        plan,
        activations=tuple((name, how) for name, how in plan.activations if any(leg.has(name) for leg in legs)),
        table_rows=tuple((name, rows) for name, rows in plan.table_rows if name in own),
    )


def _train(folder: Path, told: dict[str, Any]) -> None:
    case, group = Case(**told), find_group(close=told["close"])
    model = make_model(case.family, case.tied, case.layers, case.hidden)
    plan = plan_of(model, case)
    if case.legs:
        plan = in_line(model, plan, group.rank)
    own = folder / f"worker-{group.rank}"
    own.mkdir()
    job = bind_job(model, optimizer(case.optimizer), plan, own, group)
    losses, norms = [], []
    start = dict(group.ledger.moved)
    for number, micro_batches in enumerate(batches_of(case, group.rank)):
        if number == case.fails:
            _fail(job, micro_batches)
        result = job.train_step(micro_batches)
        losses.append(result.loss)
        norms.append(result.norm)
    job.flush()
    moved = {key: count - start.get(key, 0) for key, count in group.ledger.moved.items()}
    found = {"losses": losses, "norms": norms, "weights": weights_of(job)}
    found["ledger"] = {"moved": moved, "held": dict(group.ledger.held), "shares": shares_of(job)}
    if sharers(case) == 1:  # others have no batch in common
        found["evaluated"] = job.evaluate(iter(micro_batches[:2]))
    job.store.flush()
    job.store.transfers.drain()
    torch.save(found, folder / f"found-{group.rank}")
    group.each(0)
    job.close()
    group.close()


def _fail(job: Job, micro_batches: list[dict[str, torch.Tensor]]) -> None:
    """A step that ends in its last layer, which others wait for no longer."""

    def fail(*_: object) -> None:
        raise ArithmeticError("the last layer was told to fail")

    layer = [unit.module for unit in find_units(job.model) if unit.repeated][-1]
    hook = layer.register_forward_pre_hook(fail)
    try:
        job.train_step(micro_batches)
    except ArithmeticError:
        hook.remove()
    else:
        raise AssertionError("the last layer was not asked")
    job.flush()
    entries = job.store.entries.values()
    assert not [entry.block.name for entry in entries if entry.home.name == PEER and entry.pins]
    weights_of(job)


def batches_of(case: Case, rank: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The micro-batches of a worker, step by step."""
    for sequences in make_batches(case.steps, case.sequences, sequences=1):
        count, place = sharers(case), rank % sharers(case)
        mine = range(len(sequences) * place // count, len(sequences) * (place + 1) // count)
        yield [
            {
                key: torch.cat([sequences[index][key] for index in mine[first : first + case.batch]])
                for key in sequences[0]
            }
            for first in range(0, len(mine), case.batch)
        ]


def weights_of(job: Job) -> dict[str, torch.Tensor]:
    return {name: job.read(name, 0, weight.shape[0] if weight.shape else 1) for name, weight in job.weights.items()}


def shares_of(job: Job) -> dict[str, list[list[int]]]:
    """Own elements, of how many, and whether they are all that is at home; of each block."""
    return {
        block.name: [len(block.shares.own), block.shares.numel, block.split]
        for weight in job.weights.values()
        for block in weight.blocks
    }


def _run(folder: Path, told: dict[str, Any]) -> None:
    """As the command line does it."""
    from outsize import training
    from outsize.distributed import measure, meeting
    from outsize.train.settings import TrainSettings

    if "without" in told and os.environ["RANK"] == "1":
        os.environ.update(MASTER_PORT="1")
    meeting.TO_MEET = told.get("without", meeting.TO_MEET)
    measure.LONG, measure.SIZES, measure.COOLED, measure.MATRICES = (
        0.01,
        measure.SIZES[:2],
        1 << 20,
        4,
    )  # roughly, but soon
    if "disk" in told:
        training.recall = lambda *given: None  # each try is planned anew
    if told.get("disk"):
        training.plan_training = _on_disk(training.plan_training)
    given = told["settings"] | told.get("own", {}).get(os.environ.get("RANK", "0"), {})
    if (another := given.pop("version", None)) is not None:
        training.version = lambda name: another
    paths = {name: Path(given[name]) for name in ("data", "out", "plan") if name in given}
    training.train(TrainSettings(**given | paths))


def _on_disk(planned: Callable[..., Plan]) -> Callable[..., Plan]:
    """Nothing stays near, though there is room."""
    return lambda *given: replace(
        planned(*given), near_weights=frozenset(), near_states=frozenset(), arena_bytes=32 << 20
    )


def _answer(folder: Path, told: dict[str, Any]) -> None:
    """Serve prompts, the first worker asking; what it said, the logits of every step, and what went over the wire."""
    group = find_group()
    make = partial(tiny_model, told["family"], tied=told["tied"], layers=5)
    lengths = tuple(told["lengths"])
    with bound_model(lambda: make().eval(), told["streamed"], [], group=group, lengths=lengths) as found:
        own = Path(told["directory"]) / str(group.rank) if "directory" in told else None
        if group.rank:
            follower = found.runner(**told["sizes"], index=found.index(own, told["sizes"].get("far_pages", 0)))
            follower.follow()
            follower.close()
        else:
            with found.engine(**told["sizes"], directory=own) as engine:
                said = _asked(engine, told["prompts"], told["sampling"])
            said |= {"moved": dict(group.ledger.moved), "recorded": engine.runner.recorded}
            torch.save(said, folder / "said")
    torch.save({"moved": dict(group.ledger.moved)}, folder / f"ledger-{group.rank}")


def _asked(engine: Engine, prompts: list[list[int]], sampling: dict[str, Any]) -> dict[str, Any]:
    """Twice: the second time some of the pages are known, near or far."""
    logits, run_alone = [], engine.runner.run

    def noting(*given: Any) -> torch.Tensor:
        logits.append(run_alone(*given).clone())
        return logits[-1]

    engine.runner.run = noting
    tokens, cached = [], 0
    for _ in range(2):
        asked = [ask(engine, prompt, **sampling) for prompt in prompts]
        run(engine)
        tokens += [[heard.tokens(index) for index in range(request.sampling.n)] for request, heard in asked]
        cached += sum(request.cached_tokens for request, _ in asked)
    return {"tokens": tokens, "cached": cached, "logits": logits, "preemptions": engine.scheduler.preemptions}


def _join(folder: Path, told: dict[str, Any]) -> None:
    """Be a worker that serves, for no time."""
    with joined(30.0, ""):
        assert any(thread.name == "watch" for thread in threading.enumerate())
    assert not any(thread.name == "watch" for thread in threading.enumerate())


def _leave(folder: Path, told: dict[str, Any]) -> None:
    """The first worker has begun what the other never will, and goes."""
    group = find_group()
    if group.rank == 0:
        group.begin_gather(torch.zeros(256), group.shares(256))
        group.leave()
        (folder / "left").touch()
        return
    end = time.monotonic() + 20
    while not (folder / "left").exists():
        assert time.monotonic() < end, "it waits for who never comes"
        time.sleep(0.05)
    group.leave()


def _crowd(folder: Path, told: dict[str, Any]) -> None:
    """Workers of two nodes, which are one machine."""
    group = find_group()
    assert group.here == 1 and group.nodes == 2
    found = measure_crowd(group)
    assert found.workers == 2
    group.close()


Doing = Callable[[Path, dict[str, Any]], None]
DO: dict[str, Doing] = {
    "train": _train,
    "run": _run,
    "answer": _answer,
    "join": _join,
    "leave": _leave,
    "crowd": _crowd,
}


if __name__ == "__main__":
    serve()
