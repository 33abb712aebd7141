"""The files of one model: a directory in Hugging Face layout, or a single .gguf file.

The weights of a directory are safetensors files, or those of a torch.distributed.checkpoint.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..tokenizer.json_file import read_json
from .config import ModelConfig, token_ids
from .fields import Fields, shown

if TYPE_CHECKING:
    from ..tokenizer.tokenizer import Tokenizer
    from .gguf_files import GgufFile
    from .stored import Weights


class ModelFiles:
    """Config, tokenizer and weights of a model; each file is read once, when it is asked for.

    adapter: a folder with a LoRA adapter of PEFT, which is added to the weights. Raises ValueError
    for a folder whose own adapter nobody asked for.
    """

    def __init__(self, path: Path, adapter: Path | None = None) -> None:
        self.path, self.adapter = path, adapter
        if not self._is_gguf:
            _check_adapter(path, adapter)

    @property
    def _is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"

    @cached_property
    def _gguf(self) -> GgufFile:
        from .gguf_files import GgufFile

        return GgufFile(self.path)

    @cached_property
    def config(self) -> ModelConfig:
        """With the stop ids of generation_config.json where there is one."""
        return self._gguf.config if self._is_gguf else read_config(self.path)

    def tokenizer(self) -> Tokenizer:
        """Raises ValueError naming the file that is missing or not supported."""
        # not above: a model is loaded and run without any tokenizer library
        if self._is_gguf:
            from ..tokenizer.gguf_vocabulary import gguf_tokenizer

            return gguf_tokenizer(self._gguf.metadata, str(self.path))
        from ..tokenizer.tokenizer import Tokenizer

        return Tokenizer.from_directory(self.path)

    def weights(self) -> Weights:
        """The tensors, of which only names and shapes are read so far, and any adapter."""
        base = self._base_weights()
        if self.adapter is None:
            return base
        from .lora import AdaptedWeights

        return AdaptedWeights(base, self.adapter)

    def _base_weights(self) -> Weights:
        if self._is_gguf:
            return self._gguf
        from .dcp_metadata import METADATA

        if (self.path / METADATA).exists():
            from .dcp_files import DistributedCheckpoint

            return DistributedCheckpoint(self.path, self.config)
        from .safetensors_files import SafetensorsFiles

        return SafetensorsFiles(self.path, self.config.fp8_block)


def read_config(directory: Path) -> ModelConfig:
    """config.json, with the stop ids of generation_config.json where there is one."""
    config = ModelConfig.from_hf(directory / "config.json")
    generation = directory / "generation_config.json"
    if not generation.exists():
        return config
    stop_ids = token_ids(Fields(read_json(generation), str(generation)), "eos_token_id")
    return dataclasses.replace(config, eos_token_ids=stop_ids or config.eos_token_ids)


def _check_adapter(directory: Path, adapter: Path | None) -> None:
    """Refuse a folder with an adapter in it that nobody asked for: transformers would apply it."""
    path = directory / "adapter_config.json"
    if not path.exists() or (adapter is not None and adapter.resolve() == directory.resolve()):
        return
    if (directory / "config.json").exists():
        raise ValueError(
            f"{directory} holds {path.name} beside a model: give --adapter {directory} to add that "
            "adapter, or move it away"
        )
    base = read_json(path).get("base_model_name_or_path")
    raise ValueError(
        f"{directory} holds a LoRA adapter alone: give its base model ({shown(base)}) as MODEL and "
        f"--adapter {directory}"
    )
