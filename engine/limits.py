"""How much is kept or done at once: what bounds memory, known to the loop and to its plan."""

PREFILL_CHUNK = 256  # positions of a request that are fed at once
CAPTURED_ROWS = 8192  # states that a chunk of the prompt may hand to a lens at once
DECODED_POSITIONS = 64  # captured positions that share a reading of the head's weight
RING_TOKENS = 64  # decode steps whose taps a deferred lens keeps before it decodes them
ROW_SCALARS = 4  # numbers of a row's record beside k ids and k log-probs
MOST_BATCH = 64  # requests at once: with more, a step gains little and takes long
CAPACITY_STEP = 256  # positions; capacity of captured steps is rounded up, to fit the next text too


def rounded_up(n: int, least: int = 1) -> int:
    """The next power of two, but at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


def batch_bucket(n_requests: int, device_type: str) -> int:
    """Slots for n_requests: a power of two where steps are captured."""
    return rounded_up(n_requests) if device_type == "cuda" else n_requests


def cache_capacity(n_tokens: int, context: int, device_type: str) -> int:
    """Positions of a cache for texts of n_tokens, at most the model's context."""
    if device_type != "cuda":
        return n_tokens
    return min(context, -(-n_tokens // CAPACITY_STEP) * CAPACITY_STEP)
