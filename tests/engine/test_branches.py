"""Branches of one text against a whole pass over each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import RunRanks
from oracles import FAMILIES, hf_model, save
from steered import edit_table, load
from tolerances import EFFECT, PASSES
from torch import Tensor

from shardlens.engine import Steering, run_branches, shared_prefix
from shardlens.kernels import Edits
from shardlens.model import POINTS, RowTaps, Tap, TapEdits
from shardlens.parallel import TensorParallel


def texts(n_shared: int, m: int, t: int) -> tuple[list[int], Tensor]:
    generator = torch.Generator().manual_seed(3)
    shared = torch.randint(3, 509, (n_shared,), generator=generator).tolist()
    return shared, torch.randint(3, 509, (m, t), generator=generator)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("n_shared, m, t", [(11, 5, 3), (0, 2, 4), (1, 1, 1), (40, 9, 1)])
def test_as_whole_passes(family: str, n_shared: int, m: int, t: int, tmp_path: Path) -> None:
    """Against transformers over each whole text, at every point of every layer."""
    torch.manual_seed(0)
    hf = hf_model(family)
    model = load(save(hf, tmp_path), TensorParallel.single())
    shared, branches = texts(n_shared, m, t)
    cache = shared_prefix(model, shared)
    before = cache.keys.clone()
    with torch.no_grad():
        hidden = run_branches(model, cache, branches)
        whole = torch.cat((torch.tensor([shared] * m, dtype=torch.int64).view(m, -1), branches), 1)
        expected = hf.double()(whole).logits[:, n_shared:].log_softmax(-1)
        logits = model.norm(hidden) @ model.head.weight.T
    error = (logits.double().log_softmax(-1) - expected).abs().max()
    assert error < PASSES
    assert torch.equal(cache.keys, before) and cache.longest == n_shared
    if n_shared + t > 1:  # a branch that does not see the text, or sees another branch
        with torch.no_grad():
            alone = hf(branches if n_shared else branches.flatten()[None]).logits
        away = alone.log_softmax(-1).view(m, t, -1) - expected
        assert away.abs().max() > EFFECT * PASSES


@pytest.mark.parametrize("size", [1, 2, 4])
def test_edits_and_taps_of_rows(size: int, tmp_path: Path, run_ranks: RunRanks) -> None:
    """Each branch with another edit; states at all taps as in whole passes with an edit table."""
    torch.manual_seed(0)
    directory = save(hf_model("qwen3", num_key_value_heads=4), tmp_path)
    shared, branches = texts(7, 4, 2)
    vectors = torch.randn(4, 48, generator=torch.Generator().manual_seed(5))
    edited = [Tap(0, "mlp_norm"), Tap(1, "resid_post"), Tap(2, "attn_out"), Tap(1, "resid_pre")]
    taps = [Tap(layer, point) for layer in range(3) for point in POINTS]

    def body(parallel: TensorParallel) -> tuple[Tensor, Tensor, Tensor]:
        model = load(directory, parallel)
        edits = {}
        for number, tap in enumerate(edited):
            index = torch.full((4, 2), -1)
            index[number] = number
            tap_edits = Edits(
                vectors, torch.zeros(4, dtype=torch.int32), index.flatten(), torch.full((8,), 1.5)
            )
            edits[tap.canonical] = (tap_edits,)
        capture = RowTaps(taps, torch.arange(8), 48, dtype=model.dtype)
        run_branches(
            model, shared_prefix(model, shared), branches, sink=capture, edits=TapEdits(edits)
        )
        states = capture.states.unflatten(0, (4, 2))
        whole, plain = [], []
        for number, tap in enumerate(edited):
            ids = torch.tensor([[*shared, *branches[number].tolist()]])
            steering = Steering(vectors[number], [tap.layer], tap.point, scale=1.5, positions=7)
            table = edit_table([([steering], 9)], 9, model).at
            for found, given in ((whole, table), (plain, None)):
                capture = RowTaps(taps, torch.arange(7, 9), 48, dtype=model.dtype)
                with torch.no_grad():
                    model(ids, sink=capture, edits=given)
                found.append(capture.states)
        return states, torch.stack(whole), torch.stack(plain)

    for states, whole, plain in run_ranks(size, body):
        scale = whole.abs().max()
        assert (states - whole).abs().max() < PASSES * scale
        assert ((states - plain).abs().amax((1, 2, 3)) > EFFECT * PASSES * scale).all()
