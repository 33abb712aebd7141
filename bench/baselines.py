"""The rivals of `bench end-to-end`, on transformers.

FaithfulBaseline   LogitLens4LLMs, the single-GPU baseline of the paper: no cache, every component
                   of every layer decoded at every position, in both of two forwards per token.
CachedLens         what a careful user writes: cached generation, and at each step the last
                   position's states of all layers through the head.
PaperMethod        cached generation that keeps those states, and one decode of all at the end.

All generate greedily, and give the lens of every block's resid_post at the position that predicted
each new token; the last block's is the model's output. Where an original does what only costs
(text and back, one wait for the device per component), it is left out: that favours the rival.

The loops call the model's own forward. generate() also prepares inputs, processes logits and tests
for stopping, none of which belongs to a method; on a CPU both cost the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine import available_bytes

OnToken = Callable[[int], None]
COMPONENTS = 4  # of a block: attention output, mid residual, MLP output, block output


@dataclass(frozen=True)
class RunOutput:
    """New tokens, and the lens at the position that predicted each, if there is one. On the CPU."""

    token_ids: list[int]
    lens_ids: Tensor | None  # [T_new, L, k] int64, best first
    lens_logprobs: Tensor | None  # [T_new, L, k] float32


@dataclass(frozen=True)
class FaithfulBaseline:
    """LogitLens4LLMs on a transformers model, in the dtype of its weights: 8L + 2 head products
    over all T positions per token.
    """

    hf: Any

    @torch.inference_mode()
    def run(
        self, prompt: list[int], max_new_tokens: int, top_k: int, on_token: OnToken | None = None
    ) -> RunOutput:
        """Raises ValueError if the logits would not fit into memory."""
        self._check_memory(len(prompt) + max_new_tokens - 1)
        ids = torch.tensor([prompt], device=self.hf.device)  # [1, T]
        tokens: list[int] = []
        read: list[tuple[Tensor, Tensor]] = []
        with every_component_decoded(self.hf) as layers:
            for _ in range(max_new_tokens):
                # Each forward fills a cache, as is the default, and throws it away.
                self.hf(ids)
                read.append(_last_position(layers, top_k))
                logits = self.hf(ids).logits  # [1, T, V]
                token = logits[:, -1].argmax(-1, keepdim=True)
                ids = torch.cat((ids, token), 1)
                _append(tokens, token, on_token)
        return _output(tokens, read)

    def _check_memory(self, longest: int) -> None:
        config, itemsize = self.hf.config, self.hf.dtype.itemsize
        held = COMPONENTS * config.num_hidden_layers + 2  # and the model's own, and the next
        needed = held * longest * config.vocab_size * itemsize
        require_bytes(needed, self.hf.device, f"the baseline's logits of {longest} positions")


@contextmanager
def every_component_decoded(hf: Any) -> Iterator[list[dict[str, Tensor]]]:
    """Every forward leaves here the logits [1, T, V] of each layer's four components, by name.

    They live until the next forward has made their successors.
    """
    kept: list[dict[str, Tensor]] = [{} for _ in hf.model.layers]
    hooks = []
    for layer, logits in zip(hf.model.layers, kept, strict=True):
        hooks += _decode_components(hf, layer, logits)
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
        kept.clear()


def _decode_components(hf: Any, layer: Any, kept: dict[str, Tensor]) -> list[Any]:
    attention: list[Tensor] = []

    def unembed(x: Tensor) -> Tensor:  # [1, T, d] -> [1, T, V]
        logits: Tensor = hf.lm_head(hf.model.norm(x))
        return logits

    def after_attention(module: Any, inputs: Any, output: Any) -> None:
        attention.append(output[0])

    def after_block(module: Any, inputs: Any, output: Tensor) -> None:
        attn_out = attention.pop()
        kept["attn_out"] = unembed(attn_out)
        resid_mid = attn_out + inputs[0]
        kept["resid_mid"] = unembed(resid_mid)
        # the block has run its MLP already; the original runs it again rather than keep its output
        mlp_out = layer.mlp(layer.post_attention_layernorm(resid_mid))
        kept["mlp_out"] = unembed(mlp_out)
        kept["resid_post"] = unembed(output)

    return [
        layer.self_attn.register_forward_hook(after_attention),
        layer.register_forward_hook(after_block),
    ]


def _last_position(layers: list[dict[str, Tensor]], top_k: int) -> tuple[Tensor, Tensor]:
    """(ids, log-probs) [L, k] of the block outputs; the other components are read alike."""
    read = [
        {name: _top_k_of_copy(logits[0, -1:], top_k) for name, logits in kept.items()}
        for kept in layers
    ]
    ids, logprobs = zip(*(layer["resid_post"] for layer in read), strict=True)
    return torch.cat(ids), torch.cat(logprobs)


@dataclass(frozen=True)
class CachedLens:
    """transformers with its cache, and the head over all layers' last states at each step."""

    hf: Any

    @torch.inference_mode()
    def run(
        self, prompt: list[int], max_new_tokens: int, top_k: int, on_token: OnToken | None = None
    ) -> RunOutput:
        tokens: list[int] = []
        read: list[tuple[Tensor, Tensor]] = []
        with last_states(self.hf) as states:
            for token in cached_greedy(self.hf, prompt, max_new_tokens):
                # launched before the token is waited for, so that the device has work meanwhile
                read.append(lens(self.hf, torch.stack(states), top_k))
                states.clear()
                _append(tokens, token, on_token)
        return _output(tokens, read)


@dataclass(frozen=True)
class PaperMethod:
    """The paper: cached generation, kept states, one decode at the end with full float32 logits.

    by_layer: a product for each layer instead of one for all, as its released code does; then
    the logits of only one layer, [T_new, V], exist at a time.
    """

    hf: Any
    by_layer: bool = False

    @torch.inference_mode()
    def run(
        self, prompt: list[int], max_new_tokens: int, top_k: int, on_token: OnToken | None = None
    ) -> RunOutput:
        """Raises ValueError if the logits would not fit into memory."""
        n_layers = self.hf.config.num_hidden_layers
        self._check_memory(max_new_tokens * (1 if self.by_layer else n_layers))
        tokens: list[int] = []
        with last_states(self.hf) as states:
            for token in cached_greedy(self.hf, prompt, max_new_tokens):
                _append(tokens, token, on_token)
            rows = torch.stack(states).unflatten(0, (-1, n_layers))  # [T_new, L, d]
        parts = rows.split(1, dim=1) if self.by_layer else (rows,)
        # The original's probabilities are a softmax over the k candidates, which is wrong; here
        # they are against the whole vocabulary, at no further memory.
        read = [lens(self.hf, part.flatten(0, 1), top_k) for part in parts]
        ids, logprobs = (
            torch.cat([found.unflatten(0, (max_new_tokens, -1)) for found in column], 1).cpu()
            for column in zip(*read, strict=True)
        )
        return RunOutput(tokens, ids, logprobs)

    def _check_memory(self, n_rows: int) -> None:
        # A smaller piece at a time would be another method: too much is refused, not split.
        half = 0 if self.hf.dtype == torch.float32 else self.hf.dtype.itemsize
        needed = n_rows * self.hf.config.vocab_size * (4 + half)
        require_bytes(needed, self.hf.device, f"the paper's method's logits of {n_rows} rows")


@contextmanager
def last_states(hf: Any) -> Iterator[list[Tensor]]:
    """A list to which every forward adds the last position's resid_post [d] of all L blocks."""
    states: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        states.append(output[0, -1].clone())  # a view would pin a whole prompt's states

    # transformers' own `hidden_states` has the last block's only after the final norm
    hooks = [layer.register_forward_hook(keep) for layer in hf.model.layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def cached_greedy(hf: Any, prompt: list[int], n_tokens: int) -> Iterator[Tensor]:
    """Each new token [1, 1] once its forward is launched; of equals, the lowest id."""
    ids, cache = torch.tensor([prompt], device=hf.device), None
    for _ in range(n_tokens):
        output = hf(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        ids = output.logits[:, -1].argmax(-1, keepdim=True)
        yield ids


@torch.inference_mode()
def read_with_moved_mlp_inputs(
    hf: Any, prompt: list[int], token_ids: list[int], move: Tensor, top_k: int
) -> RunOutput:
    """The lens of a given continuation, with `move` [d] added where MLPs read for new tokens."""

    def add(module: Any, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, len(prompt) - 1 :] += move
        return output

    states: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        states.append(output[0, len(prompt) - 1 :])

    hooks = []
    for layer in hf.model.layers:
        hooks.append(layer.post_attention_layernorm.register_forward_hook(add))
        hooks.append(layer.register_forward_hook(keep))
    try:
        hf.model(torch.tensor([[*prompt, *token_ids[:-1]]], device=hf.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    rows = torch.stack(states, 1)  # [T_new, L, d]
    ids, logprobs = lens(hf, rows.flatten(0, 1), top_k)
    return RunOutput(
        token_ids, *(found.unflatten(0, rows.shape[:2]).cpu() for found in (ids, logprobs))
    )


def lens(hf: Any, states: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """states [N, d] -> (ids, log-probs) [N, k]; the logits [N, V] exist all at once."""
    return _top_k(hf.lm_head(hf.model.norm(states)).float(), top_k)


def _top_k(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(ids, log-probs) [N, k] of float32 logits [N, V], which are spent.

    In place: faster than log_softmax, and without its second tensor of that size.
    """
    best = logits.topk(top_k)
    highest = best.values[:, :1]
    log_total = highest + logits.sub_(highest).exp_().sum(-1, keepdim=True).log()
    return best.indices, best.values - log_total


def _top_k_of_copy(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return _top_k(logits.to(torch.float32, copy=True), top_k)


def _append(tokens: list[int], token: Tensor, on_token: OnToken | None) -> None:
    tokens.append(int(token))
    if on_token is not None:
        on_token(tokens[-1])


def _output(tokens: list[int], read: list[tuple[Tensor, Tensor]]) -> RunOutput:
    ids, logprobs = (torch.stack(column).cpu() for column in zip(*read, strict=True))
    return RunOutput(tokens, ids, logprobs)


def require_bytes(needed: int, device: torch.device, what: str) -> None:
    """Raise ValueError if so much is not free: a CPU's memory running out kills without a word."""
    free = free_bytes(device)
    if needed > free:
        raise ValueError(
            f"{what} take {needed / 2**30:.1f} GiB at once, {free / 2**30:.1f} GiB are free: "
            "ask for fewer tokens"
        )


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        # what PyTorch holds in reserve is free too
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    return available_bytes()
