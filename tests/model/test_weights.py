"""Loading: shards and slices, what is refused by name, and how much memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import hf_model, save
from safetensors.torch import load_file, save_file
from torch import Tensor

import shardlens
from shardlens.model import (
    Transformer,
    find_model,
    hf_state_dict,
    init_weights,
    load_weights,
    read_config,
)
from shardlens.model.sharding import tensor_table
from shardlens.parallel import TensorParallel


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(hf_model("qwen3"), tmp_path / "checkpoint")


def loaded(directory: Path, parallel: TensorParallel | None = None) -> Transformer:
    model = Transformer(read_config(directory), parallel=parallel)
    load_weights(model, directory)
    return model


def test_one_file_and_shards_load_alike(tmp_path: Path) -> None:
    hf = hf_model("llama-biases")
    whole = loaded(save(hf, tmp_path / "one"))
    sharded_directory = save(hf, tmp_path / "many", shards=True)
    assert len(list(sharded_directory.glob("*.safetensors"))) > 2
    sharded = loaded(sharded_directory)
    for (name, a), b in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert torch.equal(a, b), name
    exported = hf_state_dict(whole)
    assert exported.keys() == hf.state_dict().keys()
    assert all(torch.equal(exported[name], value) for name, value in hf.state_dict().items())


def test_every_rank_holds_different_slices(checkpoint: Path, run_ranks: Any) -> None:
    """A fused weight of a rank is the fusion of its parts; vocabulary padding is zero."""
    full = load_file(checkpoint / "model.safetensors")

    def body(parallel: TensorParallel) -> dict[str, Tensor]:
        return dict(loaded(checkpoint, parallel).named_parameters())

    ranks = run_ranks(4, body)
    q, k, v = (full[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    for rank, parameters in enumerate(ranks):
        kv = slice(20 * (rank // 2), 20 * (rank // 2) + 20)  # 2 KV heads of 20 on 4 ranks
        expected = torch.cat((q[20 * rank : 20 * rank + 20], k[kv], v[kv]))
        assert torch.equal(parameters["blocks.1.attn.qkv.weight"], expected)
        down = full["model.layers.1.mlp.down_proj.weight"][:, 25 * rank : 25 * rank + 25]
        assert torch.equal(parameters["blocks.1.mlp.down.weight"], down)
    heads = [parameters["head.weight"] for parameters in ranks]
    assert {tuple(head.shape) for head in heads} == {(128, 48)}
    assert torch.equal(torch.cat(heads)[:509], full["lm_head.weight"])
    assert (torch.cat(heads)[509:] == 0).all()


def test_random_weights_are_the_same_at_every_rank_count(checkpoint: Path, run_ranks: Any) -> None:
    config = read_config(checkpoint)

    def body(parallel: TensorParallel) -> Tensor:
        model = Transformer(config, parallel=parallel)
        init_weights(model, seed=3)
        return model.head.valid_weight.detach()

    whole = run_ranks(1, body)[0]
    assert torch.equal(torch.cat(run_ranks(2, body)), whole)
    assert 0.015 < whole.std() < 0.025


def test_dtype_is_the_checkpoints_or_the_callers(tmp_path: Path, stories: Path) -> None:
    assert shardlens.load(stories).model.dtype == torch.float32
    model = shardlens.load(stories, dtype=torch.bfloat16).model
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert model.head.weight is model.embed.weight


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_tensors(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return change


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def index_without_file(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


NORM = "model.layers.2.input_layernorm.weight"
BAD = {
    "no config": (remove("config.json"), "config.json does not exist"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), "cannot be read as JSON"),
    "config lacks": (
        lambda d: (d / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}'),
        "config.json lacks",
    ),
    "no weights": (remove("model.safetensors"), "neither model.safetensors nor"),
    "truncated": (truncate, "not a whole safetensors file"),
    "shard missing": (index_without_file, "model-00001-of-00002.safetensors does not exist"),
    "architecture": (change_config(architectures=["MixtralForCausalLM"]), "MixtralForCausalLM"),
    "no architecture": (
        change_config(architectures=None, model_type=None),
        "neither architectures nor model_type",
    ),
    "rope type": (change_config(rope_parameters={"rope_type": "longrope"}), "longrope"),
    "quantised": (change_config(quantization_config={"quant_method": "gptq"}), "gptq"),
    "activation": (change_config(hidden_act="gelu"), "gelu"),
    "dtype": (change_config(dtype="float8_e4m3fn"), "float8_e4m3fn"),
    "partial rope": (change_config(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "missing": (change_tensors(lambda t: t.pop(NORM)), f"lacks tensor {NORM}"),
    "left over": (
        change_tensors(lambda t: t.update({"model.layers.9.x": torch.ones(1)})),
        "holds tensor model.layers.9.x",
    ),
    "misshapen": (
        change_tensors(lambda t: t.update({NORM: torch.ones(47)})),
        rf"tensor {NORM} .*\[47\].*\[48\]",
    ),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_checkpoints_are_refused_by_name(name: str, checkpoint: Path) -> None:
    spoil, message = BAD[name]
    loaded(checkpoint)
    spoil(checkpoint)
    with pytest.raises(ValueError, match=message):
        loaded(checkpoint)


def test_what_no_directory_and_no_hub_id_is() -> None:
    with pytest.raises(ValueError, match="/no/such/place is not a directory"):
        find_model("/no/such/place", TensorParallel.single())


def test_hub_id_is_downloaded_whole(monkeypatch: pytest.MonkeyPatch, stories: Path) -> None:
    """The hub itself is out of reach in tests: what we ask of huggingface_hub is checked."""
    import huggingface_hub

    asked: list[Any] = []

    def snapshot_download(hub_id: str, **options: Any) -> str:
        asked.append((hub_id, options))
        return str(stories)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = shardlens.load("someone/stories-260K", revision="v1.0").model
    assert model.config.n_layers == 5
    for hub_id, options in asked:
        assert (hub_id, options["revision"]) == ("someone/stories-260K", "v1.0")
        assert options["ignore_patterns"] == ["*/*"]  # nothing below the top folder
    first, second = (set(options["allow_patterns"]) for _, options in asked)
    assert first == {"*.json", "*.model", "*.jinja", "merges.txt"}
    assert second - first == {"model.safetensors"}  # and neither consolidated.* nor adapter_*


def test_of_shards_the_files_of_the_index_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    folder = save(hf_model("llama-gqa-tied"), tmp_path / "shards", shards=True)
    asked: list[list[str]] = []

    def snapshot_download(hub_id: str, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_model("a/b", TensorParallel.single()).weights().shapes
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and asked[1][-len(shards) :] == shards


def test_unreachable_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no connection\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"a/b is not a local directory .*: no connection$"):
        shardlens.load("a/b")


def test_published_indices_name_what_the_model_needs(shared_data: Path) -> None:
    """Tensor names of true checkpoints, from their published indices, equal those we fill."""
    seen = 0
    for index in sorted((shared_data / "index/generated").glob("*.json")):
        name = index.name.removesuffix(".model.safetensors.index.json")
        directory = shared_data / "configs" / name
        if not directory.is_dir() or "A3B" in name:
            continue
        table = tensor_table(read_config(directory))
        needed = {tensor.name for parts in table.values() for tensor in parts}
        assert needed == set(json.loads(index.read_text())["weight_map"]), name
        seen += 1
    assert seen >= 6


MEASURE = """
import sys, threading
from pathlib import Path
import torch
from shardlens.model import Transformer
from shardlens.model.model_files import read_config
from shardlens.model.safetensors_files import SafetensorsFiles
from shardlens.model.weights import load_weights
from shardlens.parallel.group import TensorParallel

def status(field):
    line = next(l for l in open("/proc/self/status") if l.startswith(field))
    return int(line.split()[1]) * 1024

directory = Path(sys.argv[1])
parallel = TensorParallel(object(), 1, 4)  # one of four ranks: loading does not communicate
model = Transformer(read_config(directory), parallel=parallel, device="meta")
SafetensorsFiles(directory)
torch.randn(64, 64) @ torch.randn(64, 64)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
model.to_empty(device="cpu")
load_weights(model, directory)
held = sum(p.numel() * p.element_size() for p in model.parameters())
print((status("VmHWM") - before) / held)
"""


@pytest.mark.slow
def test_peak_memory_of_loading(tmp_path: Path) -> None:
    """Peak resident memory over the shard, mapped pages counted in, as one of four ranks."""
    options = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, vocab_size=32000)
    directory = save(hf_model("llama-mha", **options, num_attention_heads=16), tmp_path / "large")
    command = [sys.executable, "-c", MEASURE, str(directory)]
    ratio = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.95 < ratio <= 1.15
