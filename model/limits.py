"""How much is kept or done at once: what bounds memory, known to the loop and to its plan."""

PREFILL_CHUNK = 256  # positions of a request that are fed at once
CAPTURED_ROWS = 8192  # states that a chunk of the prompt may hand to a lens at once
DECODED_POSITIONS = 64  # captured positions that share a reading of the head's weight
RING_TOKENS = 64  # decode steps whose taps a deferred lens keeps before it decodes them
ROW_SCALARS = 4  # numbers of a row's record beside k ids and k log-probs
CAPACITY_STEP = 256  # of a cache that graphs hold on to, so that the next text fits it too
