"""A disposition as a vector: made from questions, measured on others, used to steer a text.

    python examples/steer_an_answer.py

Under torchrun the same program runs on several ranks, and only the first prints.
"""

import shardlens
from shardlens.interp import split_pairs
from shardlens.model import DEMO

parallel = shardlens.TensorParallel.from_env()
lm = shardlens.load("demo", parallel=parallel)

# a question with two options each; where there is no such description, leave `contrast` out and
# the answers themselves are compared
pairs = shardlens.read_pairs(DEMO / "dispositions-cautious-bold.jsonl")
train, test = split_pairs(pairs, share=0.4, seed=0)
contrast = ("Anna is cautious.", "Anna is bold.")
vectors = lm.extract(train, layers="1-3", contrast=contrast)
report = lm.steerability(test[:40], vectors)

prompt = "A bear stands near the barn. Anna wants to"
scales = (-1.0, 0.0, 1.0)
steerings = [shardlens.Steering(vectors, layers=[1], scale=scale) for scale in scales]
results = lm.generate(
    [shardlens.Request(prompt, max_new_tokens=12, steering=[steering]) for steering in steerings]
)

if parallel.rank == 0:
    for tap, slope, control in zip(report.taps, report.slopes, report.control_slopes, strict=True):
        print(
            f"layer {tap.layer}: slope {slope.mean:+.2f} ({slope.low:+.2f} to {slope.high:+.2f}), "
            f"of a random vector {control.mean:+.2f}"
        )
    for scale, result in zip(scales, results, strict=True):
        print(f"{scale:+.0f}  {prompt}{result.text}")
