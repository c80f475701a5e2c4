"""What Outsize's serving stands beside: transformers, accelerate's offloading, llama.cpp and airllm.

Rates are tokens/s. Decoding is timed as the difference between many new tokens and one, so that reading the prompt and
the first pass over the weights do not count."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

from cgroup import make_cold, memory_cgroup
from child import Skip

WORDS = range(20, 32)  # the prompt of everybody past memory


def seconds(work: Callable[[], Any]) -> float:
    started = perf_counter()
    work()
    return perf_counter() - started


def rate(generate: Callable[[int], Any], batch: int, new: int) -> float:
    """Tokens a second after the first; `generate(n)` makes `n` new tokens in each sequence of the batch."""
    generate(1)  # to warm up
    first = seconds(lambda: generate(1))
    return batch * (new - 1) / (seconds(lambda: generate(new)) - first)


@contextmanager
def _beside(place: str, limit: int | None) -> Iterator[Path]:
    """A folder to be used, in a memory cgroup, with nothing of the model in the page cache."""
    make_cold(Path(place))
    with memory_cgroup(limit), tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)


# -- past memory --------------------------------------------------------------------------------------------------------


def accelerate(place: str, memory: int, batches: list[int], new: int, limit: int | None = None) -> dict[str, Any]:
    """transformers with accelerate's offloading to disk: `memory` bytes of weights near."""
    with _beside(place, limit) as folder:
        try:
            import torch
            from accelerate import __version__
            from transformers import AutoModelForCausalLM
        except ImportError as problem:
            raise Skip(f"{problem.name} is not installed") from problem
        model = AutoModelForCausalLM.from_pretrained(
            Path(place) / "model",
            dtype=torch.bfloat16,
            device_map="auto",
            max_memory={"cpu": memory},
            offload_folder=folder,
        )
        prompt = torch.tensor([[*WORDS]])
        return {"version": __version__} | {
            f"b{batch}": rate(lambda n, batch=batch: generate(model, prompt.repeat(batch, 1), n), batch, new)
            for batch in batches
        }


def airllm(place: str, batches: list[int], new: int, limit: int | None = None) -> dict[str, Any]:
    """airllm, which reads one layer after the other."""
    with _beside(place, limit) as folder:
        try:
            import torch
            from airllm import AutoModel
        except ImportError as problem:
            raise Skip(f"{problem.name} is not installed") from problem
        model = AutoModel.from_pretrained(
            str(Path(place) / "model"), device="cpu", dtype=torch.bfloat16, layer_shards_saving_path=str(folder)
        )
        prompt = torch.tensor([[*WORDS]])

        def run(batch: int, n: int) -> None:
            model.generate(prompt.repeat(batch, 1), max_new_tokens=n, min_new_tokens=n, use_cache=True, pad_token_id=0)

        return {f"b{batch}": rate(lambda n, batch=batch: run(batch, n), batch, new) for batch in batches}


def llama_cpp(place: str, batches: list[int], new: int, limit: int | None = None) -> dict[str, Any]:
    """llama.cpp's own server without HTTP (package xllamacpp), bf16, the file mapped into memory."""
    with _beside(place, limit):
        try:
            import xllamacpp
        except ImportError as problem:
            raise Skip(f"{problem.name} is not installed") from problem
        params, most = xllamacpp.CommonParams(), max(batches)
        params.model.path = str(Path(place) / "model.gguf")
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 64 * most, most, False, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
        server = xllamacpp.Server(params)

        def run(batch: int, n: int) -> None:
            asked = {"prompt": [*WORDS], "n_predict": n, "ignore_eos": True, "cache_prompt": False, "temperature": 0}
            with ThreadPoolExecutor(batch) as pool:
                for answer in pool.map(server.handle_completions, [asked] * batch):
                    if answer["usage"]["completion_tokens"] != n:
                        raise RuntimeError(f"llama.cpp answered {answer}")

        return {"version": xllamacpp.__version__} | {
            f"b{batch}": rate(lambda n, batch=batch: run(batch, n), batch, new) for batch in batches
        }


# -- all resident -------------------------------------------------------------------------------------------------------


class Elsewhere:
    """`transformers` with the model at `path` in bf16, in a process of its own and as it comes: the settings of the C
    library and of OpenMP that Outsize makes would help it, or not, unlike in anybody's own program. Idle until asked."""

    def __init__(self, path: str) -> None:
        context = get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_answer, args=(path, far), daemon=True)
        kept = os.environ.pop("GOMP_SPINCOUNT", None)
        self._process.start()
        if kept is not None:
            os.environ["GOMP_SPINCOUNT"] = kept
        far.close()

    def decode(self, prompts: list[list[int]], new: int) -> float:
        """Tokens a second of a static batch, after the first of each."""
        return self._ask("_decode", prompts, new)

    def generate(self, batches: list[list[tuple[list[int], int]]]) -> float:
        """Seconds for (prompt, new tokens) in static batches, padded: a batch takes as long as its longest answer."""
        return self._ask("_generate_batches", batches)

    def _ask(self, name: str, *arguments: Any) -> float:
        self._pipe.send((name, arguments))
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def _answer(path: str, pipe: Any) -> None:
    model = whole_model(path)
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send({"_decode": _decode, "_generate_batches": _generate_batches}[name](model, *arguments))


def _decode(model: Any, prompts: list[list[int]], new: int) -> float:
    import torch

    # Other tokens the second time, though nothing is remembered anyway.
    return rate(lambda n: generate(model, torch.tensor(prompts) + (n > 1), n), len(prompts), new)


def _generate_batches(model: Any, batches: list[list[tuple[list[int], int]]]) -> float:
    import torch

    def run() -> None:
        for batch in batches:
            longest = max(len(prompt) for prompt, _ in batch)
            padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in batch])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
            generate(model, padded, max(new for _, new in batch), mask)

    return seconds(run)


def whole_model(path: str) -> Any:
    """The model as transformers has it, through a folder of files."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from outsize.model.load import open_model

    source = open_model(path)
    with tempfile.TemporaryDirectory() as folder:
        tensors = {name: source.read(name).to(torch.bfloat16).contiguous() for name in source.shapes()}
        save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})
        source.save_companions(folder, torch.bfloat16)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def generate(model: Any, prompts: Any, new: int, mask: Any = None) -> Any:
    """transformers' own, greedy, with exactly `new` tokens."""
    import torch

    mask = torch.ones_like(prompts) if mask is None else mask
    with torch.no_grad():
        return model.generate(
            prompts, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
