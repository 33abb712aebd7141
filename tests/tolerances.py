"""Every tolerance of the suite, in one place. They are never widened to make a run green."""

LOGITS_RELATIVE = 2e-5  # float32 logits against transformers, relative to the largest logit
LENS = 1e-5  # log-probs, entropy and KL against float64, in nats
CHUNKING = 1e-5  # the same numbers computed in blocks of another size
# The same numbers from states of two float32 passes (decode and prefill): the random models here
# amplify rounding, most of all in the lens of a small attn_out.
PASSES = 1e-4
GRADIENT_RELATIVE = 1e-5  # float32 gradients of sharded layers against unsharded ones
# A kernel's error to float64 may exceed that of the same-dtype PyTorch expression by so many
# float32 roundings (whatever the dtype: inside, all is float32) of the row's largest value.
KERNEL_EPS = 4
# And its mean error that expression's by so much: where two roundings follow each other, the last
# bit of a sum before them turns a few of them either way.
KERNEL_MEAN = 1.01
EXTRACTED = 1e-5  # a float32 vector against float64 passes, relative to its largest entry
SAME_STATES = 1e-6  # the same from the very same states: it is rounded to float32
FLOAT64 = 1e-12  # two float64 computations of one number of order 1
GUMBEL = 4e-6  # a kernel's noise, of size up to 22.9, against the float64 inside of the reference
P_VALUE = 1e-3  # a chi-square test of a right sampler fails this often; seeds are fixed
PLANNED = 0.1  # memory predicted by `plan` against what is measured, above the weights
EFFECT = 10  # a bug that a test is there to catch misses by at least so many tolerances
