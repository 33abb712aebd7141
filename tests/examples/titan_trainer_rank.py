"""One rank of `test_titan_monitor.py`: python titan_trainer_rank.py RANK SIZE STORE TP

The step of torchtitan's own trainer, with its loss in chunks, monitored by titan_monitor.py. The
trainer's data, logging and checkpoints are left out: a GPU or more packages would be needed. Prints
the metrics, and the loss that the trainer found, as JSON lines.
"""

from __future__ import annotations

import json
import logging
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
import torchtitan.distributed.parallel_dims as dims_module
from titan_rank import VOCAB, causal, config, parallelism, split_model, tokens
from torchtitan.config import CompileConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.attention import FlexAttention

for absent in ("datasets", "datasets.distributed", "torch.utils.tensorboard"):
    sys.modules[absent] = MagicMock()

from titan_monitor import add_monitor  # noqa: E402
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss  # noqa: E402
from torchtitan.distributed.utils import get_spmd_context, set_spmd_backend  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402


def made_trainer(tp: int, size: int) -> Trainer:
    split = parallelism(tp, True, size)
    set_spmd_backend(split.spmd_backend)
    dims = ParallelDims.from_config(split, size)
    dims.build_mesh()
    trainer = object.__new__(Trainer)
    model = split_model(dims, tp, True, size)
    loss_config = CrossEntropyLoss.Config(global_vocab_size=VOCAB)
    trainer.loss_fn = ChunkedLossWrapper.Config(loss_fn=loss_config).build(
        compile_config=CompileConfig(enable=False)
    )
    trainer.loss_fn.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    trainer.model_parts, trainer.model_config = [model], config(True)
    trainer.parallel_dims, trainer.train_context = dims, get_spmd_context(parallel_dims=dims)
    trainer.config, trainer.ntokens_seen = SimpleNamespace(parallelism=split), 0
    trainer.fwd_bwd_fn = trainer._forward_backward_body
    return trainer


def main() -> None:
    rank, size, store, tp = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    dims_module.device_type = "cpu"
    FlexAttention._compiled_flex_attn = staticmethod(causal)
    trainer = made_trainer(tp, size)
    found: list[dict[str, Any]] = []
    add_monitor(trainer, every=2, positions=10**6, to=lambda each: found.append(each.to_dict()))
    rule = torch.optim.SGD(trainer.model_parts[0].parameters(), lr=0.1)
    losses = []
    for step in range(1, 5):
        trainer.step = step
        ids = tokens(8 * step + rank // tp)
        labels = ids.roll(-1, 1)
        n_texts = size // tp
        loss = trainer.forward_backward_step(
            input_dict={"input": ids, "positions": torch.arange(ids.shape[1]).expand_as(ids)},
            labels=labels,
            global_valid_tokens=torch.tensor(labels.numel() * n_texts),
        )
        losses.append(float(loss))
        rule.step()
        rule.zero_grad()
    print(json.dumps({"rank": rank, "losses": losses, "found": found}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
