"""A budget is a wall while serving too: the whole process, measured by the operating system."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_model

SERVE = """
import json, sys
from pathlib import Path
from outsize.machine.allocator import limit_heaps
limit_heaps()
import outsize
from outsize.errors import BudgetError
from outsize.machine.describe import process_memory

def engine(memory):
    return outsize.Engine(sys.argv[1], memory=memory, context=512, concurrency=16, step_tokens=256, weights=sys.argv[3])

try:
    engine("200MiB")
except BudgetError as refused:
    least = int(str(refused).split("Give --memory ")[1].split("MiB")[0])
memory = (least + int(sys.argv[2])) << 20
with engine(memory) as served:
    prompts = [[3 + (n * k) % 900 for n in range(40 + 12 * k)] for k in range(1, 17)]
    for _ in range(2):
        answers = served.generate(prompts, max_new_tokens=12, ignore_end=True)
    far = served.engine.store.ledger.moved["host", "disk", "kv"]
    read = served.engine.store.ledger.moved["disk", "host", "weight"]
    planned = served.plan.predicted.host_peak_bytes + served.plan.headroom_bytes
    now = process_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
closing = process_memory().peak_bytes
found = {"peak": max(now.peak_bytes, closing), "closing": closing - now.resident_bytes, "read": read, "far": far}
print(json.dumps({"budget": memory, "planned": planned, **found}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 M parameters in bf16."""
    found = tmp_path_factory.mktemp("model")
    model = tiny_model("llama", tied=False, layers=16, hidden=768, vocabulary=1000).to(torch.bfloat16)
    model.save_pretrained(found)
    return found


@pytest.mark.parametrize(("more", "weights"), [(16, "stored"), (400, "int4")])
def test_a_server_stays_within_its_budget(folder: Path, more: int, weights: str) -> None:
    """With the least that works, and with all weights near; sequences give up pages and get them back. What is planned is
    where memory is given back; as much as its headroom may come beside. Closing takes no memory: weights in 4 bits are
    40 MiB that might be copied."""
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(folder), str(more), weights], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] <= found["planned"] <= found["budget"], found
    assert (found["read"] > 0) == (more < 400), found
    assert found["closing"] < 8 << 20, found
