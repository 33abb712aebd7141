"""Rows of embedding and head by token id: those of the checkpoint, on any rank, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import SMALL, hf_model, save
from safetensors.torch import load_file

from shardlens.model import ModelConfig, ModelFiles, Transformer, init_weights, load_weights
from shardlens.parallel import TensorParallel

LLAMA = SMALL | dict(architectures=["LlamaForCausalLM"])
# both ends of the 509 ids, and of the parts of 255 and 170 that 2 and 3 ranks hold
IDS = [508, 0, 254, 255, 169, 170, 340, 255, 507]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa-tied"])
def test_rows_are_those_of_the_checkpoint(
    name: str, ranks: int, run_ranks: Any, tmp_path: Path
) -> None:
    directory = save(hf_model(name), tmp_path)
    stored = load_file(directory / "model.safetensors")
    embed = stored["model.embed_tokens.weight"]
    head = embed if name.endswith("tied") else stored["lm_head.weight"]
    assert ("lm_head.weight" in stored) == (head is not embed)

    def body(parallel: TensorParallel) -> None:
        model = Transformer(ModelFiles(directory).config, parallel=parallel).requires_grad_(False)
        load_weights(model, directory)
        for ids in (IDS, tuple(IDS), torch.tensor(IDS), np.array(IDS)):
            assert torch.equal(model.embedding_rows(ids), embed[IDS])
            assert torch.equal(model.head_rows(ids), head[IDS])
        assert torch.equal(model.head_rows(508), head[[508]])
        model.embedding_rows(3).zero_()  # a copy, which changes no weight
        assert torch.equal(model.embedding_rows(3), embed[[3]])

    run_ranks(ranks, body)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ids_without_a_row_are_refused(ranks: int, run_ranks: Any) -> None:
    """The only row of padding, on 2 ranks and on 3, would be that of id 509."""
    config = ModelConfig.from_hf(LLAMA)

    def body(parallel: TensorParallel) -> None:
        model = Transformer(config, parallel=parallel)
        init_weights(model)
        for rows in (model.embedding_rows, model.head_rows):
            for ids, says in [
                (509, "token id 509 is outside the vocabulary: give 0 to 508"),
                ([3, -1], "token id -1 is outside the vocabulary"),
                ([], "no token id is given"),
                (True, "token_ids is True"),
                ([2.0], r"token_ids\[0\] is 2.0"),
                ("a", "token_ids is 'a'"),
                (torch.zeros(2, 2), r"token_ids has shape \[2, 2\]"),
            ]:
                with pytest.raises(ValueError, match=says):
                    rows(ids)

    run_ranks(ranks, body)


def test_ranks_that_ask_for_other_rows_are_refused(run_ranks: Any) -> None:
    config = ModelConfig.from_hf(LLAMA)

    def body(parallel: TensorParallel) -> None:
        model = Transformer(config, parallel=parallel)
        init_weights(model)
        with pytest.raises(ValueError, match="rank 1 differs from rank 0"):
            model.embedding_rows([1, 2 + parallel.rank])
        with pytest.raises(ValueError, match="rank 1 differs from rank 0"):
            (model.head_rows if parallel.rank else model.embedding_rows)(3)

    run_ranks(2, body)
