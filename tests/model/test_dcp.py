"""Checkpoints of torch.distributed.checkpoint load here under the names that jobs give them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dcp_folders
import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import expected, is_close, logits
from oracles import hf_model, save
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardlens.cli import main
from shardlens.model import (
    DEMO,
    ModelFiles,
    Transformer,
    hf_state_dict,
    load_weights,
    sharded_state_dict,
)
from shardlens.parallel import TensorParallel

States = dict[str, Tensor]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(hf_model("llama-biases"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(hf_model("qwen3-tied"), tmp_path_factory.mktemp("qwen"))


def states_of(model: Path) -> States:
    return load_file(model / "model.safetensors")


# Saved by ranks, and read on other numbers of ranks


@pytest.mark.parametrize(
    "name, ranks, in_pieces",
    [
        ("llama-mha", 2, ""),
        ("llama-gqa-tied", 4, "kv"),  # two ranks hold a key head; 4 does not divide the ids
        ("qwen3-16-heads", 3, "qkvo"),  # a rank holds a key head twice
        ("qwen2-14-heads", 4, "qkvo"),  # queries are padded
    ],
)
def test_ours_on_any_number_of_ranks(
    name: str, ranks: int, in_pieces: str, tmp_path: Path, run_ranks: Any
) -> None:
    """Saved on some ranks, loaded in place into other weights, and read on other numbers."""
    hf = hf_model(name)
    files, folder = ModelFiles(save(hf, tmp_path / "hf")), tmp_path / "dcp"

    def body(parallel: TensorParallel) -> str:
        model = Transformer(files.config, parallel=parallel)
        load_weights(model, files.weights())
        where = {"checkpoint_id": folder, "process_group": parallel.group}
        dcp.save(sharded_state_dict(model), **where)
        before = [parameter.clone() for parameter in model.parameters()]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        states = sharded_state_dict(model)
        dcp.load(states, **where)
        assert all(map(torch.equal, model.parameters(), before))
        heads = {each: states[f"model.layers.0.self_attn.{each}_proj.weight"] for each in "qkvo"}
        return "".join(each for each, state in heads.items() if not isinstance(state, DTensor))

    assert run_ranks(ranks, body) == [in_pieces] * ranks
    shutil.copy(tmp_path / "hf" / "config.json", folder)
    for other in (1, 3):
        assert is_close(logits(ModelFiles(folder), run_ranks, other), expected(hf)), other


def test_one_rank_has_views_of_its_parameters(llama: Path) -> None:
    model = Transformer(ModelFiles(llama).config)
    load_weights(model, llama)
    states = sharded_state_dict(model)
    for name, tensor in hf_state_dict(model).items():
        assert torch.equal(states[name], tensor)
    states["model.layers.1.self_attn.k_proj.weight"].zero_()
    assert (model.blocks[1].attn.qkv.weight[48:72] == 0).all()


def test_what_ranks_hold_in_pieces_is_for_checkpoints_alone(llama: Path, run_ranks: Any) -> None:
    config = ModelFiles(llama).config

    def body(parallel: TensorParallel) -> None:
        states = sharded_state_dict(Transformer(config, parallel=parallel))
        q = states["model.layers.0.self_attn.q_proj.weight"]
        assert q.shape == (48, 48) and "PiecedTensor([48, 48]" in repr(q)
        with pytest.raises(
            NotImplementedError, match=r"that ranks hold in pieces: it is there for"
        ):
            q + 1
        whole = states["lm_head.weight"]
        assert isinstance(whole, DTensor) and whole.shape == (509, 48)

    run_ranks(3, body)


# Names


def wrapped(states: States) -> States:
    return {
        "_orig_mod." + name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."): tensor
        for name, tensor in states.items()
    }


def bare(states: States) -> States:
    return {name.removeprefix("model."): tensor for name, tensor in states.items()}


def under(key: str) -> Callable[[States], States]:
    return lambda states: {f"{key}{name}": tensor for name, tensor in states.items()}


def torchtitan(states: States, heads: dict[str, int] | None = None) -> States:
    """Under torchtitan's names. heads: those of q and k, if its rows are in Meta's order."""
    words = {
        "model.embed_tokens": "tok_embeddings",
        "model.layers": "layers",
        "model.norm": "norm",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "self_attn": "attention",
        "q_proj": "qkv_linear.wq",
        "k_proj": "qkv_linear.wk",
        "v_proj": "qkv_linear.wv",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
    }
    renamed = {}
    for name, tensor in states.items():
        for projection, n_heads in (heads or {}).items():
            if projection in name:
                pairs = tensor.view(n_heads, 2, -1, *tensor.shape[1:]).transpose(1, 2)
                tensor = pairs.reshape(tensor.shape)
        for word, theirs in words.items():
            name = name.replace(word, theirs)
        renamed[name] = tensor
    return renamed


NAMES: dict[str, tuple[str, Callable[[States], States]]] = {
    "plain": ("llama", lambda states: states),
    "under a key": ("llama", under("model.")),
    "under two keys": ("llama", under("app.model.")),
    "wrapped": ("llama", wrapped),
    "wrapped, under a key": ("qwen", lambda states: under("state_dict.")(wrapped(states))),
    "without a head": ("qwen", bare),
    "torchtitan's llama": ("llama", lambda s: torchtitan(s, {"q_proj": 4, "k_proj": 2})),
    "torchtitan's qwen": ("qwen", lambda states: under("model.")(torchtitan(states))),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_training_jobs(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """With an optimizer, a scheduler and a counter beside the model."""
    which, rename = NAMES[name]
    model = request.getfixturevalue(which)
    states = states_of(model)
    others = {
        "optimizer": {"state": {"model.embed_tokens.weight": {"exp_avg": torch.ones(3)}}},
        "lr_scheduler": {"last": torch.tensor(3)},
        "step": 7,
    }
    folder = dcp_folders.write(rename(states) | others, tmp_path / "dcp", model)
    read = dcp_folders.tensors(folder)
    assert read.keys() == states.keys()
    for key, tensor in states.items():
        assert torch.equal(read[key], tensor), key


def test_the_rows_of_torchtitan_are_in_another_order(tmp_path: Path, llama: Path) -> None:
    """Or the test above could not fail: and each rank reads its own part of a head's rows."""
    states = states_of(llama)
    theirs = torchtitan(states, {"q_proj": 4, "k_proj": 2})
    key = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(theirs["layers.0.attention.qkv_linear.wq.weight"], states[key])
    folder = dcp_folders.write(theirs, tmp_path / "dcp", llama)
    for model in (llama, folder):
        config = ModelFiles(model).config
        part = Transformer(config, parallel=TensorParallel(object(), 1, 3))  # type: ignore[arg-type]
        load_weights(part, model)
        if model == llama:
            whole = dict(part.named_parameters())
    assert all(torch.equal(whole[name], value) for name, value in part.named_parameters())


# Layouts and types


def test_strides_and_types(tmp_path: Path, llama: Path) -> None:
    states = states_of(llama)
    key, other = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
    changed = states | {
        key: states[key].T.contiguous().T,
        other: states[other].bfloat16(),
        "model.norm.weight": torch.stack((states["model.norm.weight"],) * 2, 1)[:, 0],
    }
    assert not changed[key].is_contiguous()
    read = dcp_folders.tensors(dcp_folders.write(changed, tmp_path / "dcp", llama))
    assert all(torch.equal(read[name], tensor) for name, tensor in changed.items())
    assert read[other].dtype == torch.bfloat16


def test_a_model_of_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo model as a distributed checkpoint, with its tokenizer beside."""
    folder = dcp_folders.write(states_of(DEMO), tmp_path / "dcp", DEMO)
    for path in DEMO.glob("*.json"):
        shutil.copy(path, folder)
    words = ["--prompt", "Anna is", "--max-new-tokens", "8"]
    printed = []
    for model in ("demo", str(folder)):
        assert main(["generate", model, *words]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and len(printed[0]) > 10


PEAK = """
import sys
from pathlib import Path
import torch
from shardlens.model import ModelFiles, Transformer, load_weights
from shardlens.parallel import Span, TensorParallel

def status(field):
    line = next(l for l in open("/proc/self/status") if l.startswith(field))
    return int(line.split()[1]) * 1024

files = ModelFiles(Path(sys.argv[1]))
parallel = TensorParallel(object(), 1, 4)  # one of four ranks: loading does not communicate
model = Transformer(files.config, parallel=parallel, device="meta")
weights = files.weights()
list(weights.read("model.norm.weight", Span(0, 1, 1024, 1), None))  # torch imports what it needs
torch.randn(64, 64) @ torch.randn(64, 64)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
model.to_empty(device="cpu")
load_weights(model, weights)
held = sum(p.numel() * p.element_size() for p in model.parameters())
print((status("VmHWM") - before) / held)
"""


@pytest.mark.slow
def test_peak_memory_of_loading(tmp_path: Path) -> None:
    """Peak resident memory over the rank's weights, where each tensor is stored in one chunk."""
    options = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, vocab_size=32000)
    model = hf_model("llama-mha", **options, num_attention_heads=16)
    model.config.save_pretrained(tmp_path)
    folder = dcp_folders.write(model.state_dict(), tmp_path / "dcp", tmp_path)
    command = [sys.executable, "-c", PEAK, str(folder)]
    ratio = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.95 < ratio <= 1.15


def test_a_config_stands_beside(tmp_path: Path, llama: Path) -> None:
    folder = dcp_folders.write(states_of(llama), tmp_path / "dcp", llama)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json does not exist"):
        ModelFiles(folder).weights()
