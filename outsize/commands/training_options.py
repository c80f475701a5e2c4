"""What can be said of a training job on the command line: `outsize train` and `outsize plan` ask for it alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[Path | None, typer.Option(help="A .txt, .md, .jsonl or .parquet file, or a folder of such.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the run. The same command on it continues where it stopped.")]
Resume = Annotated[
    Path | None,
    typer.Option(help="Continue the run in this folder with its own settings; others given here replace them."),
]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps in all.")]
SequenceLength = Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences that pass through a layer together.")]
Accumulate = Annotated[int, typer.Option(min=1, help="Micro-batches a step. More of them cost no more disk traffic.")]
Precision = Annotated[str, typer.Option(help="mixed (bf16 compute, fp32 master), fp32, or bf16 (approximate).")]
Moments = Annotated[str, typer.Option(help="fp32, or bf16 (approximate, less traffic).")]
Optimizer = Annotated[str, typer.Option(help="adamw, sgd, adafactor, muon, any torch.optim class, or a dotted path.")]
OptimizerOption = Annotated[
    list[str] | None, typer.Option(help="name=value for the optimizer's class; may be given several times.")
]
OptimizerState = Annotated[
    Path | None,
    typer.Option(help="Begin with the optimizer's state in this folder, as outsize checkpoint export writes it."),
]
AtLeastZero = Annotated[int, typer.Option(min=0)]
LearningRate = Annotated[float, typer.Option(min=0.0)]
Schedule = Annotated[
    str, typer.Option(help="cosine, linear, constant, warmup-stable-decay, rex, power, or a torch class.")
]
Clip = Annotated[
    float | None, typer.Option(min=0.0, help="Largest global gradient norm. The update becomes a second pass.")
]
Loss = Annotated[str, typer.Option(help="auto, blocked (over blocks of the vocabulary) or module (its own).")]
Activations = Annotated[
    str,
    typer.Option(
        help="What becomes of what forward leaves for backward: keep; recompute; attention, which keeps the results of that "
        "and recomputes the rest; move, to disk, or of a device to its host's memory; or auto."
    ),
]
CommitEvery = Annotated[
    int | None, typer.Option(min=1, help="Steps between commits. State on disk is committed every step for free.")
]
Keeper = Annotated[
    bool,
    typer.Option(
        help="Let a small process hold the last step in memory, where all state stays there and has room twice: a "
        "crash then loses none. It costs some percent of each step."
    ),
]
KeepLast = Annotated[int, typer.Option(min=0, help="Keep the newest commits, to roll back to.")]
KeepEvery = Annotated[
    int, typer.Option(min=0, help="Keep every k-th step. Each kept step costs as much disk as training rewrites.")
]
EvalData = Annotated[Path | None, typer.Option(help="Text to evaluate on, read like --data.")]
EvalEvery = Annotated[int, typer.Option(min=0, help="Steps between evaluations; also after the last one.")]
SamplePrompt = Annotated[str | None, typer.Option(help="Let the model continue this text in the middle of training.")]
BlockClass = Annotated[str | None, typer.Option(help="Class of the repeated block, if it is not found.")]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        help="Obey this plan, written by `outsize plan --save`; refused if it does not fit. Without --memory with its budget."
    ),
]
Replan = Annotated[
    bool,
    typer.Option(
        help="Plan again after the first steps if they take much longer than planned, with the disk as slow as it was "
        "seen: other things may stay in memory then, and no number changes."
    ),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory of each device (GPU) that training may use, such as 20GiB; 0 computes on the host. --memory is then "
        "for the process beside it."
    ),
]
Workers = Annotated[
    int, typer.Option(min=1, help="Processes on this machine that divide state and batch; --memory is for each.")
]
Close = Annotated[
    int,
    typer.Option(
        min=1,
        help="So many neighbouring workers of a node have faster links to each other than to its others (pairs: 2).",
    ),
]
Pipeline = Annotated[
    bool,
    typer.Option(help="Each of the workers has a run of layers, and micro-batches go from one to the next."),
]
Legs = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Of a pipeline: so many runs of layers, otherwise as many as are fastest. Fewer than workers: each is divided "
        "among several, as --zero says. More: each worker has several, and waits less.",
    ),
]
LegsShape = Annotated[
    str | None,
    typer.Option(
        help="Of a pipeline with several legs for each worker: loop, from the last worker to the first again; or v, back as "
        "it came, two legs for each: the first has embedding and head, and all hold equally many micro-batches. Otherwise "
        "as is faster."
    ),
]
ZeroBubble = Annotated[
    bool | None,
    typer.Option(
        help="Of a pipeline whose legs lie as a v: gradients of weights are found while others would be waited for. "
        "Activations are kept. Otherwise where that is faster."
    ),
]
Zero = Annotated[
    int, typer.Option(min=1, max=3, help="Workers divide optimizer state (1), gradients too (2), weights too (3).")
]
WorkerTimeout = Annotated[
    float, typer.Option(min=1.0, help="Seconds after which the others give up a worker that does not move.")
]
