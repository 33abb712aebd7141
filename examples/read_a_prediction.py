"""How sure each layer is of the next word, in a few lines.

    python examples/read_a_prediction.py [MODEL] [PROMPT]

Under torchrun the same program runs on several ranks, and only the first prints.
"""

import sys

import shardlens

source = sys.argv[1] if len(sys.argv) > 1 else "demo"
prompt = sys.argv[2] if len(sys.argv) > 2 else "The capital of Norvia is"

parallel = shardlens.TensorParallel.from_env()
lm = shardlens.load(source, parallel=parallel)
trace = lm.lens(prompt, top_k=3)

if parallel.rank == 0:
    print(f"{prompt} …")
    for p, tap in enumerate(trace.taps):
        best = zip(
            trace.token_ids[-1, p].tolist(), trace.logprobs[-1, p].exp().tolist(), strict=True
        )
        shown = "  ".join(f"{trace.text_of(token)!r} {chance:.3f}" for token, chance in best)
        print(
            f"layer {tap.layer:2}  {shown}   KL to the output {trace.kl_to_final[-1, p]:.2f} nats"
        )
