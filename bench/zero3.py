"""DeepSpeed ZeRO-3 with parameters and optimizer state on disk, the nearest thing there is to a streamed step."""

from __future__ import annotations

import os
import shutil
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

from shapes import SEQUENCE_LENGTH, SHAPES, Shape

SKIPPED = 2


def train(place: str, shape: str, steps: int) -> dict[str, Any]:
    """Train random weights of the shape in bf16 with an fp32 master, everything that DeepSpeed can put on disk there."""
    from child import Skip

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    os.environ.update(alone, DS_ACCELERATOR="cpu")
    try:
        import deepspeed
    except ImportError as problem:
        raise Skip(f"DeepSpeed does not import here: {problem}") from problem
    import torch
    import torch._dynamo  # it compares signatures of torch.Tensor's as it is imported, which zero.Init replaces
    from plain import batches, build

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    settings = _settings(SHAPES[shape], Path(place) / "zero3")
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = build(SHAPES[shape], torch.bfloat16, recompute=True)
    optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(model.parameters(), lr=2e-5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    before = _disk_bytes()
    seconds, loss = [], torch.zeros(())
    for batch in batches(SHAPES[shape], steps):
        started = perf_counter()
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        seconds.append(perf_counter() - started)
    shutil.rmtree(settings["zero_optimization"]["offload_param"]["nvme_path"])  # it leaves its swap files behind
    read, written = ((after - first) // steps for first, after in zip(before, _disk_bytes(), strict=True))
    return {
        "seconds": statistics.median(seconds[SKIPPED:]),
        "tokens": SEQUENCE_LENGTH,
        "bytes_read": read,
        "bytes_written": written,
        "last_loss": loss.item(),
    }


def _settings(shape: Shape, folder: Path) -> dict[str, Any]:
    """Buffers as small as they go: each must hold the largest parameter, and there must be enough of them."""
    largest = max(shape.vocabulary * shape.hidden, shape.hidden * shape.intermediate)
    near = {"device": "nvme", "nvme_path": str(folder), "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {**near, "buffer_count": 16, "buffer_size": largest, "max_in_cpu": 0},
            "offload_optimizer": {**near, "buffer_count": 12, "pipeline_read": True, "pipeline_write": True},
            "sub_group_size": largest,
            "stage3_max_live_parameters": largest,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": largest,
            "reduce_bucket_size": largest,
        },
        "aio": {"block_size": 1 << 20, "queue_depth": 16, "single_submit": False, "overlap_events": True},
    }


def _disk_bytes() -> tuple[int, int]:
    """Bytes that this process has had read from and written to disks, by the operating system's count."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"]), int(fields["write_bytes"])
