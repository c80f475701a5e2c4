"""Opening a model that is bigger than memory: its module without weights, its weights one at a time.

Peak memory while loading: one parameter, or one run of its rows, beyond the module itself (which holds no
weights) and the files' headers. Files are read with `pread`, never mapped, because mapped pages count as
resident memory.
"""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from outsize.errors import ModelError
from outsize.model.contents import Contents, find_contents, tie
from outsize.model.conversion import FileTensor
from outsize.model.files import GgufFile, HuggingFaceFolder, ModelFiles
from outsize.model.safetensors_file import PICKLES, refuse_pickles

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def open_model(path_or_hub_id: str) -> "ModelSource":
    """Open a Hugging Face folder, a single .gguf file, or a model of the hub by its id (downloaded once).

    Reads the configuration only. Raises ModelError when there is no such model, it is a pickle or already
    quantised, or its configuration cannot be read.
    """
    path = Path(path_or_hub_id).expanduser()
    if not path.exists():
        path = _download(path_or_hub_id)
    if path.is_dir():
        return ModelSource(HuggingFaceFolder(path))
    refuse_pickles([path] if path.suffix in PICKLES else [])
    if path.suffix != ".gguf":
        raise ModelError(f"{path}: neither a folder nor a .gguf file; give the folder that holds the model")
    return ModelSource(GgufFile(path))


def _download(hub_id: str) -> Path:
    """The folder of a hub model, from the cache or the network. Raises ModelError saying what was tried."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id) or hub_id.endswith((".gguf", *PICKLES)):
        raise ModelError(f"{hub_id}: there is no such file or folder")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # the hub's own, or of whichever HTTP library it uses
        raise ModelError(
            f"{hub_id}: there is no such file or folder here ({Path(hub_id).absolute()}), and as a model of "
            f"the Hugging Face hub it could not be fetched: {error}"
        ) from error


class ModelSource:
    """A model in its files. Of its weights only what `read` returns is ever in memory."""

    def __init__(self, files: ModelFiles) -> None:
        """Reads the configuration. Raises ModelError, see `open_model`."""
        self.path = files.path
        self.files = files
        self.config = self._read_config()

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the weights in the files, as the configuration says."""
        return self.config.dtype if isinstance(self.config.dtype, torch.dtype) else torch.float32

    def build(self, dtype: torch.dtype) -> torch.nn.Module:
        """The unmodified transformers module, in eval mode, as `from_pretrained` gives it, without weights.

        Every parameter is on the meta device in `dtype` (those that transformers insists on keeping in
        float32 excepted), tied weights are one Parameter; every buffer is on the CPU with its values.
        Raises ModelError when transformers has no language model for the configuration, or when a parameter
        is missing from the files or has another shape there.
        """
        contents = self._contents
        model = self._construct(dtype)
        tie(model, contents.absent, contents.untied)
        for name in _kept_in_float32(model, dtype):
            parameter_or_buffer = model.get_parameter_or_buffer(name)
            parameter_or_buffer.data = parameter_or_buffer.data.float()
        _fill_buffers(model, contents.tensors)
        # So that `save_pretrained` writes the files' layout.
        model._weight_conversions = contents.conversions  # pyright: ignore[reportArgumentType]
        return model.eval()

    def outline(self, dtype: torch.dtype) -> torch.nn.Module:
        """The module as `build` gives it, of the configuration alone: for a folder without weights, which can be planned
        for. What is tied is what the configuration ties; buffers are on the CPU. Raises ModelError as `build`."""
        model = self._construct(dtype)
        tie(model, set(model.all_tied_weights_keys), [])
        _fill_buffers(model, {})
        return model.eval()

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype in the files of every parameter, in the module's order; of tied names the first."""
        contents = self._contents
        first = {source: name for name, source in reversed(contents.parameters.items())}
        shapes = {}
        for name, source in contents.parameters.items():
            if first[source] == name:
                shapes[name] = (tuple(contents.tensors[source].shape), contents.tensors[source].dtype)
        return shapes

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) along the first dimension of a parameter of the built module, contiguous.

        In the files' dtype; out of a GGUF in float32. Memory: these rows; where transformers rearranges the
        tensor, up to three times the parameter. Raises ModelError when the name is unknown or a file damaged.
        """
        contents = self._contents
        if name not in contents.parameters:
            raise ModelError(f"{self.path}: the model has no parameter {name}")
        return contents.tensors[contents.parameters[name]].read(start, stop)

    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """The model's tokenizer, or None when there is none. Raises ModelError when it cannot be read."""
        try:
            return self.files.tokenizer()
        except Exception as error:  # tokenizers raises a bare Exception on damaged files
            raise ModelError(f"{self.path}: its tokenizer cannot be read: {error}") from error

    def save_companions(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write what belongs beside weights: config.json, generation_config.json and the tokenizer's files.

        `dtype` is that of the weights, in which `from_pretrained` will load them; None: what config.json
        says, else float32.
        """
        own = self.config.dtype if isinstance(self.config.dtype, torch.dtype) else torch.float32
        model = self._construct(dtype or own)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        if model.can_generate():
            model.generation_config.save_pretrained(directory)
        if (tokenizer := self.tokenizer()) is not None:
            tokenizer.save_pretrained(directory)

    def _read_config(self) -> "PreTrainedConfig":
        try:
            config = self.files.config()
        except ModelError:
            raise
        except Exception as error:  # a damaged file raises whatever the parser meets first
            raise ModelError(f"{self.path}: its configuration cannot be read: {error}") from error
        if (quantised := getattr(config, "quantization_config", None)) is not None:
            raise ModelError(
                f"{self.path}: its weights are quantised ({dict(quantised).get('quant_method', 'unknown')}), "
                "which Outsize does not read from safetensors; use the original model or a GGUF file"
            )
        config.name_or_path = str(self.path)
        return config

    @cached_property
    def _contents(self) -> Contents:
        return find_contents(self.files, self._construct(torch.float32))

    def _construct(self, dtype: torch.dtype) -> "PreTrainedModel":
        """The module on the meta device, buffers included, nothing tied: as within `from_pretrained`."""
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

        auto: Any = AutoModelForSeq2SeqLM if self.config.is_encoder_decoder else AutoModelForCausalLM
        with ExitStack() as stack:
            for context in PreTrainedModel.get_init_context(dtype, False, False, False):
                stack.enter_context(context)
            try:
                model = auto.from_config(deepcopy(self.config), dtype=dtype)
            except (ValueError, ImportError) as error:
                raise ModelError(f"{self.path}: transformers cannot build this model: {error}") from error
        if model.can_generate() and (generation := self.files.generation_config()) is not None:
            model.generation_config = generation
        return model


def _kept_in_float32(model: "PreTrainedModel", dtype: torch.dtype) -> list[str]:
    """Names in the state that transformers keeps in float32 under a lower precision, by its own list."""
    patterns = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]
    return [name for name in model.state_dict() if any(re.search(pattern, name) for pattern in patterns)]


def _fill_buffers(model: "PreTrainedModel", tensors: Mapping[str, FileTensor]) -> None:
    """Buffers from the files or by the module's initialisation, told that parameters have their values."""
    for name, buffer in list(model.named_buffers()):
        value = torch.empty_like(buffer, device="cpu")
        if name in tensors:
            value.copy_(tensors[name].read())
            value._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, value)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
    model.initialize_weights()
