"""Small calls of the head, with all that it can be asked, and of attention, for compute-sanitizer.

python -m shardlens.bench.gpu_sanitized
compute-sanitizer --tool racecheck python -m shardlens.bench.gpu_sanitized
"""

from __future__ import annotations

import torch

from ..kernels.decode_attention import decode_attention
from ..kernels.head_stats import head_stats
from ..kernels.head_stats_reference import Noise, Target
from ..kernels.target_logits import target_logits
from ..model.load import default_device
from .timing import synchronize

N_IDS, D, TOP_K = 2000, 512, 5
ROWS = (1, 33)  # a step without lens, and one with a lens on 32 layers
BATCH, HEADS, KV_HEADS, HEAD_DIM, CAPACITY, LENGTHS = 2, 8, 2, 128, 512, (1, 500)


@torch.no_grad()
def main() -> None:
    device = default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    for rows in ROWS:
        x, weight = new(rows, D), new(N_IDS, D) * D**-0.5
        ids = torch.arange(rows, device=device)
        target = Target(ids, *target_logits(x, weight, ids).unbind(-1))
        noise = Noise(ids[:1], ids[:1], place=rows - 1)
        stats = head_stats(x, weight, k=TOP_K, target=target, group_size=rows, noise=noise)
        synchronize(device)
        assert stats.values.isfinite().all() and stats.key_logits.isfinite().all()
    keys, values = (new(BATCH, KV_HEADS, CAPACITY, HEAD_DIM) for _ in range(2))
    lengths = torch.tensor(LENGTHS, device=device)
    out = decode_attention(new(BATCH, HEADS, HEAD_DIM), keys, values, lengths)
    synchronize(device)
    assert out.isfinite().all()
    print("done")


if __name__ == "__main__":
    main()
