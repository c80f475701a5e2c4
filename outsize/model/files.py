"""The two kinds of model that can be opened: a Hugging Face folder, and a single GGUF file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from outsize.errors import ModelError
from outsize.model.conversion import FileTensor
from outsize.model.tensor_files import read_tensors

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.core_model_loading import WeightTransform

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt",
)  # fmt: skip


class ModelFiles(Protocol):
    """What a model's files hold. Methods raise ModelError, or what transformers raises on damaged files."""

    @property
    def path(self) -> Path: ...
    @property
    def reverses_conversions(self) -> bool:
        """Whether `save_pretrained` should undo the conversions that loading used."""
        ...

    @property
    def has_weights(self) -> bool: ...
    def config(self) -> "PreTrainedConfig": ...
    def generation_config(self) -> "GenerationConfig | None":
        """None: the one that the module makes of its configuration."""
        ...

    def tokenizer(self) -> "PreTrainedTokenizerBase | None": ...
    def tensors(self, model: "PreTrainedModel") -> "tuple[Mapping[str, FileTensor], list[WeightTransform]]":
        """The tensors under the names that `model` is loaded from, and the conversions they need."""
        ...


@dataclass(frozen=True)
class HuggingFaceFolder:
    """A folder with config.json and safetensors, as `save_pretrained` writes it."""

    path: Path
    reverses_conversions = True

    @property
    def has_weights(self) -> bool:
        return any(self.path.glob("*.safetensors"))

    def config(self) -> "PreTrainedConfig":
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.path)

    def generation_config(self) -> "GenerationConfig":
        from transformers import GenerationConfig

        if (self.path / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(self.path)
        return GenerationConfig.from_pretrained(self.path, config_file_name="config.json", _from_model_config=True)

    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        from transformers import AutoTokenizer

        if any((self.path / name).is_file() for name in _TOKENIZER_FILES):
            return AutoTokenizer.from_pretrained(self.path)
        return None

    def tensors(self, model: "PreTrainedModel") -> "tuple[Mapping[str, FileTensor], list[WeightTransform]]":
        from transformers.conversion_mapping import get_model_conversion_mapping

        return read_tensors(self.path), get_model_conversion_mapping(model)


@dataclass(frozen=True)
class GgufFile:
    """One file of llama.cpp's format, which holds configuration and tokenizer too."""

    path: Path
    reverses_conversions = False
    has_weights = True

    def config(self) -> "PreTrainedConfig":
        try:
            from outsize.model.gguf_header import read_config
        except ModuleNotFoundError as error:
            raise ModelError(
                f"{self.path}: reading GGUF needs the package {error.name}: pip install 'outsize[gguf]'"
            ) from error
        return read_config(self.path)

    def generation_config(self) -> None:
        return None

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        from outsize.model.gguf_header import read_tokenizer

        return read_tokenizer(self.path)

    def tensors(self, model: "PreTrainedModel") -> "tuple[Mapping[str, FileTensor], list[WeightTransform]]":
        from outsize.model.gguf_file import gguf_tensors

        return gguf_tensors(self.path, model)
