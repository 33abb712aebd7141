"""torchtitan's trainer with every layer monitored; it takes the words of `torchtitan.train`.

    torchrun --nproc-per-node 8 examples/titan_monitor.py --module llama3 --config llama3_8b

Written for torchtitan 0.3. A line of lens.jsonl is a look at one micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torchtitan.config import ConfigManager
from torchtitan.tools.logging import init_logger
from torchtitan.trainer import Trainer

from shardlens.interp import LensMonitor


def add_monitor(trainer: Trainer, **options: Any) -> None:
    """Look at the trainer's forward passes. options: of `LensMonitor`."""
    monitor = LensMonitor(trainer.model_parts[0], **options)
    forward_backward_step = trainer.forward_backward_step

    def watched(**given: Any) -> Any:
        with monitor.at(trainer.step, given["labels"]):
            return forward_backward_step(**given)

    trainer.forward_backward_step = watched


def main() -> None:
    init_logger()
    config = ConfigManager().parse_args()
    config.training.disable_cuda_graphs = True  # a replay of a whole step would call no hook
    trainer = config.build()
    add_monitor(trainer, every=100, to="lens.jsonl")
    try:
        trainer.train()
    finally:
        trainer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
