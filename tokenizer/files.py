"""The files of a model directory from which its tokenizer is read.

A `tokenizer.json` goes first, as with transformers; then the `tokenizer.model`, Meta's rank file or
a sentencepiece model; then `vocab.json` with `merges.txt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .added import AddedToken, configured_tokens, named_tokens
from .encoding import MOST_TOKENS, Encoder, check_count
from .hugging_face import HuggingFaceEncoder
from .json_file import read_json
from .paths import read_bytes, read_text
from .rank_file import RankFileEncoder, is_rank_file
from .split_rules import byte_level_spec
from .spm import SentencePieceEncoder

# The rule by which a directory of vocab.json and merges.txt splits text: of its tokenizer's class,
# or else of its model's type.
_RULE_OF_CLASS = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2"}
_RULE_OF_MODEL = {"qwen2": "qwen2", "qwen3": "qwen2"}


def read_settings(directory: Path) -> dict[str, Any]:
    """Returns the contents of `special_tokens_map.json`, overlaid with `tokenizer_config.json`."""
    return {
        **_optional_json(directory / "special_tokens_map.json"),
        **_optional_json(directory / "tokenizer_config.json"),
    }


def read_encoder(directory: Path, settings: Mapping[str, Any]) -> Encoder:
    """Returns the vocabulary of a directory whose `tokenizer_config.json` holds `settings`.

    Raises ValueError, naming the file and what to do, for files that are missing, broken or not
    supported.
    """
    config_path = directory / "tokenizer_config.json"
    configured = configured_tokens(settings, config_path)
    adds_bos = _flag(settings, "add_bos_token", True, config_path)
    adds_eos = _flag(settings, "add_eos_token", False, config_path)
    json_path, model_path = directory / "tokenizer.json", directory / "tokenizer.model"
    if _is_there(json_path):
        return HuggingFaceEncoder(read_json(json_path), configured, path=json_path)
    added = _with_named(configured, directory, settings)
    if model_path.is_file():
        content = read_bytes(model_path, "a vocabulary")
        if is_rank_file(content):
            return RankFileEncoder(content, added, path=model_path)
        return SentencePieceEncoder(
            content,
            added,
            spaced=settings.get("legacy") is True,
            adds_bos=adds_bos,
            adds_eos=adds_eos,
            path=model_path,
        )
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        return _from_merges(directory, settings, added)
    raise ValueError(
        f"{directory}: no tokenizer.json, no tokenizer.model, and no vocab.json with merges.txt; "
        "fetch one of them from the model"
    )


def token_name(value: Any) -> str | None:
    """Returns the text of a token that a file names by a string or by a mapping; None for none."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) and text else None


def _from_merges(
    directory: Path, settings: Mapping[str, Any], added: list[AddedToken]
) -> HuggingFaceEncoder:
    name = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    model_type = _optional_json(directory / "config.json").get("model_type")
    rule = _RULE_OF_CLASS.get(name) or (None if name else _RULE_OF_MODEL.get(str(model_type)))
    path = directory / "merges.txt"
    if rule is None:
        raise ValueError(
            f"{path}: how it splits text is not known (tokenizer_class {name!r}, model_type "
            f"{model_type!r}); put the model's tokenizer.json beside it"
        )
    lines = read_text(path, "merges").splitlines()
    check_count(len(lines), MOST_TOKENS, "merges", path)
    merges = [line for line in lines if line and not line.startswith("#version")]
    spec = byte_level_spec(rule, read_json(directory / "vocab.json"), merges, added=())
    return HuggingFaceEncoder(spec, added, path=path)


def _with_named(
    configured: list[AddedToken], directory: Path, settings: Mapping[str, Any]
) -> list[AddedToken]:
    """The configured tokens, and those that only `added_tokens.json` has."""
    path = directory / "added_tokens.json"
    listed = settings.get("additional_special_tokens") or []
    values = [*settings.values(), *(listed if isinstance(listed, list) else [])]
    special = {token_name(value) for value in values}
    known = {token.content for token in configured}
    return configured + [
        AddedToken(token.id, token.content, special=token.content in special)
        for token in named_tokens(_optional_json(path), path)
        if token.content not in known
    ]


def _optional_json(path: Path) -> dict[str, Any]:
    """Contents of a file that need not be there."""
    return read_json(path) if _is_there(path) else {}


def _is_there(path: Path) -> bool:
    """Whether something has that name, be it a link to nothing: that is no reason to do without."""
    return path.exists() or path.is_symlink()


def _flag(settings: Mapping[str, Any], name: str, default: bool, path: Path) -> bool:
    value = settings.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{path}: {name} is {value!r}, not true or false")
    return default if value is None else value
