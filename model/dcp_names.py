"""Names of tensors in a torch.distributed.checkpoint, as transformers names them.

A training job saves a model under a key of its own beside its optimizer, and wrappers leave their
marks in names. The model is found by its embedding; torchtitan's names are known, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .fields import shown

# Written into names by torch.compile, activation checkpointing, FSDP1 and DDP.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\."
)
_EMBEDDING = re.compile(r"((?:[^.]+\.)*?)(model\.embed_tokens|embed_tokens|tok_embeddings)\.weight")
# Saved beside a model: tensors under these keys are not of it.
_NOT_OF_A_MODEL = frozenset(
    "optim optimizer optimizers optimizer_state optimizer_states lr_scheduler lr_schedulers "
    "scheduler scaler dataloader train_state trainer rng rng_state rng_states".split()
)
_BARE = ("embed_tokens.", "layers.", "norm.")  # of a LlamaModel without its head

_TORCHTITAN = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "output": "lm_head",
}
_TORCHTITAN_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}


def hugging_face_names(stored: Iterable[str], origin: str) -> tuple[dict[str, str], bool]:
    """(the stored name of each tensor by transformers' name, whether they are torchtitan's).

    Names under another key than the model's, or under one for optimizers and the like, are left
    out. A name that is not known stays as it is. Raises ValueError where two models are stored, or
    two tensors under one name.
    """
    plain = {name: _WRAPPERS.sub("", name) for name in stored}
    embeddings = {
        match[1]: match[2]
        for match in map(_EMBEDDING.fullmatch, plain.values())
        if match is not None and _NOT_OF_A_MODEL.isdisjoint(match[1].split("."))
    }
    if len(embeddings) > 1:
        keys = " and ".join(shown(f"{prefix}{embeddings[prefix]}") for prefix in sorted(embeddings))
        raise ValueError(f"{origin} holds several models, with {keys}: save one alone")
    prefix, embedding = next(iter(embeddings.items()), ("", ""))
    names: dict[str, str] = {}
    for name, short in plain.items():
        rest = short.removeprefix(prefix)
        if not short.startswith(prefix) or rest.split(".")[0] in _NOT_OF_A_MODEL:
            continue
        known = _hugging_face_name(rest, embedding)
        if known in names:
            raise ValueError(
                f"{origin} holds {shown(names[known])} and {shown(name)}, which are both "
                f"{shown(known)}: save one of them"
            )
        names[known] = name
    return names, embedding == "tok_embeddings"


def _hugging_face_name(name: str, embedding: str) -> str:
    if embedding == "embed_tokens":
        return f"model.{name}" if name.startswith(_BARE) else name
    if embedding != "tok_embeddings":
        return name
    match = re.fullmatch(r"(?:layers\.(\d{1,4})\.)?(.+)\.(weight|bias)", name)
    if match is None:
        return name
    if match[1] is None:
        known, layer = _TORCHTITAN.get(match[2]), ""
    else:
        known = _TORCHTITAN_LAYER.get(match[2].replace(".qkv_linear.", "."))
        layer = f"model.layers.{int(match[1])}."
    return name if known is None else f"{layer}{known}.{match[3]}"
