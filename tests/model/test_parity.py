"""The transformer against transformers, for every family, over prefill, chunks and decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FAMILIES, hf_model, save
from running import continued
from tolerances import EFFECT, LOGITS_RELATIVE
from torch import Tensor

from shardlens.kernels import implementation
from shardlens.model import ModelConfig, Transformer, load_weights, read_config
from shardlens.parallel import TensorParallel

LENGTH = 37


class Case:
    def __init__(self, name: str, directory: Path) -> None:
        self.hf = hf_model(name)
        self.directory = save(self.hf, directory)
        self.token_ids = torch.randint(
            3, 509, (2, LENGTH), generator=torch.Generator().manual_seed(2)
        )
        with torch.no_grad():
            self.logits = self.hf(self.token_ids).logits

    def load(self, parallel: TensorParallel) -> Transformer:
        model = Transformer(read_config(self.directory), parallel=parallel)
        load_weights(model, self.directory)
        return model


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(0)
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def local_logits(model: Transformer, hidden: Tensor) -> Tensor:
    """This rank's columns of the logits."""
    return model.norm(hidden) @ model.head.valid_weight.T


@torch.no_grad()
def all_passes(model: Transformer, token_ids: Tensor) -> dict[str, Tensor]:
    """The same text through one pass, through chunks, and token by token at the end."""
    batch, length = token_ids.shape
    chunked, decoded = model.new_cache(batch, length), model.new_cache(batch, length)
    chunks = [model(part, cache=chunked) for part in token_ids.split(length * 2 // 5, dim=1)]
    first = length * 4 // 5
    steps = [model(token_ids[:, :first], cache=decoded)]
    steps += [
        model(token_ids[:, position : position + 1], cache=decoded)
        for position in range(first, length)
    ]
    hidden = {"chunks": torch.cat(chunks, 1), "decode": torch.cat(steps, 1)}
    hidden["prefill"] = model(token_ids)
    return {name: local_logits(model, states) for name, states in hidden.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_logits(case: Case, ranks: int, run_ranks: Any) -> None:
    def body(parallel: TensorParallel) -> dict[str, Tensor]:
        return all_passes(case.load(parallel), case.token_ids)

    per_rank = run_ranks(ranks, body)
    for name in ("prefill", "chunks", "decode"):
        logits = torch.cat([result[name] for result in per_rank], -1)
        error = (logits - case.logits).abs().max() / case.logits.abs().max()
        assert error <= LOGITS_RELATIVE, name


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_greedy_text(case: Case, ranks: int, run_ranks: Any) -> None:
    prompts = [case.token_ids[0, :9].tolist(), case.token_ids[1, :21].tolist()]
    expected = []
    for prompt in prompts:
        ids = case.hf.generate(
            torch.tensor([prompt]),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(ids[0].tolist())

    def body(parallel: TensorParallel) -> list[list[int]]:
        return continued(case.load(parallel), prompts, 20, prefill_chunk=8)

    for sequences in run_ranks(ranks, body):
        assert sequences == expected


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["llama-biases", "llama3-rope", "qwen2", "qwen3-tied"])
def test_on_kernels(
    name: str, ranks: int, tmp_path: Path, run_ranks: Any, device: torch.device
) -> None:
    """The same, small, with every operation a Triton kernel: logits of all passes, and text."""
    case = Case(name, tmp_path / name)
    token_ids = case.token_ids[:, :10]
    prompts = [token_ids[0, :3].tolist(), token_ids[1, :6].tolist()]

    def body(parallel: TensorParallel) -> tuple[dict[str, Tensor], list[list[int]]]:
        model = case.load(parallel).to(device)
        sequences = continued(model, prompts, 3)
        return all_passes(model, token_ids.to(device)), sequences

    with implementation("reference"):
        expected = run_ranks(1, body)[0][1]
    with implementation("triton"):
        results = run_ranks(ranks, body)
    for kind in ("prefill", "chunks", "decode"):
        logits = torch.cat([passes[kind].cpu() for passes, _ in results], -1)
        error = (logits - case.logits[:, :10]).abs().max() / case.logits[:, :10].abs().max()
        assert error <= LOGITS_RELATIVE, kind
    assert all(sequences == expected for _, sequences in results)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "qwen2", "qwen3"])
def test_bf16_errs_no_more_than_the_reference(name: str, tmp_path: Path) -> None:
    """To the float32 truth of the same bf16 weights; casts in another order would add error."""
    hf = hf_model(name, initializer_range=0.1).bfloat16()
    directory = save(hf, tmp_path / name)
    token_ids = torch.randint(3, 509, (4, LENGTH))
    model = Transformer(read_config(directory), dtype=torch.bfloat16)
    load_weights(model, directory)
    with torch.no_grad():
        ours = local_logits(model, model(token_ids)).float()
        reference = hf(token_ids).logits.float()
        truth = hf.float()(token_ids).logits
    error, allowed = ((logits - truth).pow(2).mean().sqrt() for logits in (ours, reference))
    assert error <= 1.05 * allowed


# What each option of a config changes; a runtime that ignored it would be this far off.
IGNORED = {
    "llama3-rope": dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    "llama-linear-rope": dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    "llama-yarn": dict(rope_parameters=dict(rope_type="default", rope_theta=100.0)),
    "qwen3-yarn-mscale": dict(
        rope_parameters=FAMILIES["qwen3-yarn-mscale"][1]["rope_parameters"] | {"mscale": None}
    ),
    "qwen2": dict(rope_parameters=dict(rope_type="default", rope_theta=1e4)),
}


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_options_matter(name: str) -> None:
    hf, token_ids = hf_model(name), torch.randint(3, 509, (1, LENGTH))
    ignoring = hf_model(name, **IGNORED[name])
    ignoring.load_state_dict(hf.state_dict())
    with torch.no_grad():
        logits, other = hf(token_ids).logits, ignoring(token_ids).logits
    assert (logits - other).abs().max() / logits.abs().max() > EFFECT * LOGITS_RELATIVE


@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "qwen3"])
def test_vectors_matter(name: str) -> None:
    """Biases and norms of the oracle are not at values that would hide their loss."""
    hf, token_ids = hf_model(name), torch.randint(3, 509, (1, LENGTH))
    with torch.no_grad():
        logits = hf(token_ids).logits
        for parameter_name, parameter in hf.named_parameters():
            if parameter.dim() == 1 and parameter_name.startswith("model.layers.1."):
                kept = parameter.clone()
                parameter.fill_(0.0 if parameter_name.endswith("bias") else 1.0)
                # a key bias shifts every score of a query alike, up to the rotation
                error = (hf(token_ids).logits - logits).abs().max() / logits.abs().max()
                assert error > EFFECT * LOGITS_RELATIVE, parameter_name
                parameter.copy_(kept)


def test_true_configs_are_read_or_refused(shared_data: Path) -> None:
    refused = {"Qwen3-30B-A3B": "Qwen3Moe", "Qwen3-235B-A22B": "Qwen3Moe"}
    for directory in sorted((shared_data / "configs").iterdir()):
        if not directory.is_dir():
            continue
        if directory.name in refused:
            with pytest.raises(ValueError, match=refused[directory.name]):
                read_config(directory)
        else:
            config = read_config(directory)
            Transformer(config, device="meta")
            assert config.eos_token_ids


def test_parameter_count_of_a_true_config(shared_data: Path) -> None:
    """8,030,261,248 is the published size of Llama-3.1-8B."""
    config = ModelConfig.from_hf(shared_data / "configs/Llama-3.1-8B/config.json")
    model = Transformer(config, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_261_248
