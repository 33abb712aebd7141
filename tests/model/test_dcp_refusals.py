"""Checkpoints of torch.distributed.checkpoint that are hostile, broken, or of something else."""

from __future__ import annotations

import dataclasses
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dcp_folders
import pytest
import torch
from checkpoints import change_config
from oracles import hf_model, save
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from shardlens.model import ModelFiles, Transformer, load_weights

NORM, HEAD = "model.norm.weight", "lm_head.weight"
States = dict[str, Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(hf_model("llama-mha", num_hidden_layers=1), tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    return dcp_folders.write(load_file(model / "model.safetensors"), tmp_path / "dcp", model)


def load(folder: Path) -> Transformer:
    files = ModelFiles(folder)
    model = Transformer(files.config)
    load_weights(model, files.weights())
    return model


# Hostile files run nothing


class Hostile:
    """A pickle of it makes a file in the folder that one is in when it is loaded."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_metadata_calls_nothing(folder: Path, here: Path) -> None:
    dcp_folders.change_metadata(
        folder, lambda metadata: setattr(metadata, "planner_data", Hostile())
    )
    with pytest.raises(ValueError, match=r"metadata .*'posix\.system', which is no part") as caught:
        load(folder)
    assert "\n" not in str(caught.value) and not (here / "pwned").exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert (here / "pwned").exists(), "the file is harmless, and the test cannot fail"


@pytest.mark.parametrize(
    "name", ["builtins.eval", "torch.load", "torch.distributed.checkpoint.load"]
)
def test_other_names_of_torch_are_no_part(name: str, folder: Path) -> None:
    module, _, function = name.rpartition(".")
    (folder / ".metadata").write_bytes(f"c{module}\n{function}\n(S'x'\ntR.".encode())
    with pytest.raises(ValueError, match=rf"names '{name}'"):
        load(folder)


def test_metadata_changes_no_class(folder: Path) -> None:
    """A pickle may set attributes of whatever it has named, classes among them."""
    module = "torch.distributed.checkpoint.metadata"
    program = f"c{module}\nMetadata\n(N(S'changed'\nI1\ndtb.".encode()
    (folder / ".metadata").write_bytes(program)
    with pytest.raises(ValueError, match=r"is no metadata of a torch.distributed.checkpoint"):
        load(folder)
    assert not hasattr(Metadata, "changed")
    assert pickle.loads(program) is Metadata and Metadata.changed == 1  # type: ignore[attr-defined]
    del Metadata.changed  # type: ignore[attr-defined]


def test_metadata_takes_no_room_that_it_does_not_fill(folder: Path) -> None:
    """A pickle may name an entry of its table by any number, and bytes of any length."""
    for program in (b"Nr\xff\xff\xff\x01.", b"\x8e" + (2**27).to_bytes(8, "little") + b"x."):
        (folder / ".metadata").write_bytes(program)
        files = ModelFiles(folder)
        assert files.config  # read before
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"is no metadata of a torch.distributed.checkpoint"):
            files.weights()
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 2**24


def test_numbers_call_nothing(folder: Path, here: Path) -> None:
    replace_chunk(folder, NORM, Hostile())
    with pytest.raises(ValueError, match=rf"does not hold tensor '{NORM}'") as caught:
        load(folder)
    assert "\n" not in str(caught.value) and not (here / "pwned").exists()


def replace_chunk(folder: Path, name: str, content: Any) -> None:
    """Another archive in place of a tensor's numbers."""
    torch.save(content, folder / "other.distcp")

    def change(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == name:
                info.relative_path, info.offset = "other.distcp", 0
                info.length = (folder / "other.distcp").stat().st_size

    dcp_folders.change_metadata(folder, change)


# Broken or other files


def edit(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda folder: dcp_folders.change_metadata(folder, change)


def of_norm(metadata: Any) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == NORM)


def change_file(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def rewrite(change: Callable[[States], States]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        states = {name: tensor for name, tensor in dcp_folders.tensors(folder).items()}
        dcp_folders.write(change(states), folder / "new", folder)
        for path in (folder / "new").iterdir():
            path.replace(folder / path.name)

    return spoil


def in_two_chunks(second: tuple[int, int]) -> Callable[[Path], None]:
    """The head as rows 0:300 and some others, which need not be the rest."""

    def change(metadata: Any) -> None:
        head = metadata.state_dict_metadata[HEAD]
        info = metadata.storage_data.pop(next(i for i in metadata.storage_data if i.fqn == HEAD))
        head.chunks = []
        for start, stop in ((0, 300), second):
            head.chunks.append(
                ChunkStorageMetadata(torch.Size((start, 0)), torch.Size((stop - start, 48)))
            )
            metadata.storage_data[MetadataIndex(HEAD, (start, 0))] = dataclasses.replace(info)

    return edit(change)


def compress(folder: Path) -> None:
    torch.save(torch.ones(48), folder / "plain")
    replace_chunk(folder, NORM, torch.ones(48))
    with (
        zipfile.ZipFile(folder / "plain") as plain,
        zipfile.ZipFile(folder / "other.distcp", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    length = (folder / "other.distcp").stat().st_size
    edit(lambda metadata: setattr(of_norm(metadata), "length", length))(folder)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no metadata": (lambda d: (d / ".metadata").unlink(), r".distcp files with the .metadata that"),
    "metadata cut": (change_file(".metadata", lambda b: b[: len(b) // 2]), "is no metadata of a"),
    "metadata of zeros": (change_file(".metadata", lambda b: bytes(len(b))), "is no metadata of a"),
    "metadata empty": (change_file(".metadata", lambda b: b""), "is no metadata of a"),
    "a list": (
        change_file(".metadata", lambda b: pickle.dumps([1])),
        "a list stands for a Metadata",
    ),
    "nested": (
        change_file(".metadata", lambda b: b"(" * 10**5 + b"l" * 10**5 + b"."),
        "is no metadata of a",
    ),
    "no file": (lambda d: (d / "__0_0.distcp").unlink(), "__0_0.distcp does not exist: copy"),
    "file cut": (
        change_file("__0_0.distcp", lambda b: b[:-2000]),
        "__0_0.distcp ends before tensor 'model.*, which .metadata puts there",
    ),
    "zeros": (change_file("__0_0.distcp", lambda b: bytes(len(b))), "does not hold tensor '"),
    "outside": (
        edit(lambda m: setattr(of_norm(m), "relative_path", "../x.distcp")),
        rf"tensor '{NORM}' is in '../x.distcp', which is not beside it",
    ),
    "fifo": (
        lambda d: ((d / "__0_0.distcp").unlink(), os.mkfifo(d / "__0_0.distcp")),
        "is not a regular file",
    ),
    "transformed": (
        edit(lambda m: setattr(of_norm(m), "transform_descriptors", ["zstd"])),
        rf"tensor '{NORM}' is compressed",
    ),
    "compressed": (compress, rf"does not hold tensor '{NORM}' .*compressed"),
    "negative": (edit(lambda m: setattr(of_norm(m), "offset", -1)), "sizes are .-1"),
    "shifted": (
        edit(lambda m: setattr(of_norm(m), "offset", 10)),
        f"does not hold tensor '{NORM}'",
    ),
    "gap": (in_two_chunks((310, 509)), f"chunks of tensor '{HEAD}' .*leave gaps, overlap"),
    "overlap": (in_two_chunks((290, 509)), f"chunks of tensor '{HEAD}' .*leave gaps, overlap"),
    "beyond": (in_two_chunks((300, 519)), f"chunks of tensor '{HEAD}' .*leave gaps, overlap"),
    "of another shape": (
        lambda d: replace_chunk(d, NORM, torch.ones(47)),
        f"'{NORM}' .*torch.float32 of shape .47.",
    ),
    "of another type": (
        lambda d: replace_chunk(d, NORM, torch.ones(48).half()),
        f"'{NORM}' .*a torch.float16 of shape .48.",
    ),
    "no tensor": (lambda d: replace_chunk(d, NORM, {"a": 1}), f"'{NORM}' .*a dict"),
    "missing": (rewrite(lambda s: s.pop(NORM) is None or s), f"lacks tensor {NORM}"),
    "misshapen": (rewrite(lambda s: s | {NORM: torch.ones(47)}), rf"{NORM} .*\[47\].*\[48\]"),
    "left over": (rewrite(lambda s: s | {"x.y": torch.ones(1)}), "holds tensor x.y, which the"),
    "integers": (rewrite(lambda s: s | {NORM: torch.ones(48).int()}), f"'{NORM}' .*type 'int32'"),
    "two models": (
        rewrite(lambda s: s | {f"ema.{name}": tensor for name, tensor in s.items()}),
        r"several models, with 'model.embed_tokens' and 'ema.model.embed_tokens'",
    ),
    "one name twice": (
        rewrite(lambda s: s | {f"_orig_mod.{NORM}": s[NORM]}),
        f"holds '{NORM}' and '_orig_mod.{NORM}', which are both '{NORM}'",
    ),
    "safetensors beside": (
        lambda d: save_file({NORM: torch.ones(48)}, d / "model.safetensors"),
        "holds both .metadata, a distributed checkpoint, and model.safetensors",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints_are_refused_by_name(name: str, folder: Path) -> None:
    spoil, message = BAD[name]
    load(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_metadata_has_a_bound(folder: Path) -> None:
    with (folder / ".metadata").open("ab") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(ValueError, match=r"larger than 256 MiB"):
        load(folder)


def test_torchtitan_has_no_such_model(folder: Path, model: Path) -> None:
    states = load_file(model / "model.safetensors")
    states = {n.replace("model.embed_tokens", "tok_embeddings"): t for n, t in states.items()}
    rewrite(lambda _: states)(folder)
    change_config(folder, architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    with pytest.raises(
        ValueError, match=r"torchtitan's names .* its config is of Qwen2ForCausalLM"
    ):
        load(folder)
