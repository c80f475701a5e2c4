"""Checkpoints that others have written: where in them weights and optimizer are, whatever the format.

Formats: a folder as `save_pretrained` or the transformers Trainer writes it, an export of Outsize, a safetensors file, a
file of `torch.save`, a folder of torch.distributed.checkpoint. Nothing in them is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outsize.errors import ModelError
from outsize.model.conversion import FileTensor
from outsize.model.distributed_file import METADATA, read_distributed
from outsize.model.files import ModelFiles
from outsize.model.safetensors_file import read_header
from outsize.model.tensor_files import has_tensors, read_tensors
from outsize.model.torch_file import read_torch_file

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.core_model_loading import WeightTransform

_WEIGHTS = ("model", "model_state_dict", "state_dict", "module", "weights")
_OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optim", "optimizer_states")
_AROUND = ("app", "checkpoint", "state")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
TRAINER_OPTIMIZER, TRAINER_MARK = "optimizer.pt", "trainer_state.json"


@dataclass(frozen=True)
class Foreign:
    """What was found. `weights` None: there are none. `optimizer` is the state dict of a torch optimizer, its tensors as
    they lie in files. `by_trainer`: the transformers Trainer wrote it."""

    path: Path
    weights: Mapping[str, FileTensor] | None
    optimizer: Mapping[Any, Any] | None
    by_trainer: bool = False


def read_foreign(path: Path) -> Foreign:
    """No tensor's data is read. Raises ModelError when there is nothing to read, it is damaged, or it would run code."""
    if not path.exists():
        raise ModelError(f"{path}: there is no such file or folder.")
    if path.is_dir() and (path / METADATA).exists():
        return _within(path, read_distributed(path))
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".safetensors":
        return Foreign(path, read_header(path), None)
    return _within(path, read_torch_file(path))


def _folder(path: Path) -> Foreign:
    optimizer = read_torch_file(path / TRAINER_OPTIMIZER) if (path / TRAINER_OPTIMIZER).is_file() else None
    if has_tensors(path):
        return Foreign(path, read_tensors(path), optimizer, (path / TRAINER_MARK).is_file())
    torch_files = sorted(path.glob("pytorch_model*.bin"))
    if not torch_files:
        return Foreign(path, read_tensors(path), optimizer)  # says what is missing
    weights: dict[str, FileTensor] = {}
    for file in torch_files:
        weights |= _tensors(_within(file, read_torch_file(file)).weights)
    return Foreign(path, weights, optimizer, (path / TRAINER_MARK).is_file())


def _within(path: Path, saved: Any) -> Foreign:
    """Find weights and optimizer by the names that people give them."""
    if not isinstance(saved, Mapping):
        raise ModelError(f"{path}: holds a {type(saved).__name__}, not a dictionary of tensors.")
    if not any(name in saved for name in (*_WEIGHTS, *_OPTIMIZERS, "param_groups")):
        around = next((saved[name] for name in _AROUND if isinstance(saved.get(name), Mapping)), None)
        if around is not None:
            return _within(path, around)
    if "param_groups" in saved and "state" in saved:
        return Foreign(path, None, saved)
    weights = next((saved[name] for name in _WEIGHTS if isinstance(saved.get(name), Mapping)), saved)
    optimizer = next((saved[name] for name in _OPTIMIZERS if saved.get(name)), None)
    if isinstance(optimizer, list):
        optimizer = optimizer[0] if len(optimizer) == 1 else None
    tensors = _tensors(weights)
    if not tensors:
        raise ModelError(
            f"{path}: no weights are in it. Its entries are {', '.join(map(str, list(saved)[:8]))}; they are looked for "
            f"at the top and under {', '.join(_WEIGHTS)}."
        )
    return Foreign(path, tensors, optimizer)


def _tensors(weights: Any) -> dict[str, FileTensor]:
    found = {str(name): value for name, value in (weights or {}).items() if hasattr(value, "read")}
    for prefix in _PREFIXES:
        if found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


@dataclass(frozen=True)
class ForeignFiles:
    """Foreign weights with the configuration and the tokenizer of a model folder: files that ModelSource opens."""

    path: Path
    beside: ModelFiles
    weights: Mapping[str, FileTensor]
    reverses_conversions = True
    has_weights = True

    def config(self) -> PreTrainedConfig:
        return self.beside.config()

    def generation_config(self) -> GenerationConfig | None:
        return self.beside.generation_config()

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self.beside.tokenizer()

    def tensors(self, model: PreTrainedModel) -> tuple[Mapping[str, FileTensor], list[WeightTransform]]:
        from transformers.conversion_mapping import get_model_conversion_mapping

        return self.weights, get_model_conversion_mapping(model)
