"""Where a decoder that somebody else wrote keeps its blocks, norms and head.

Differences between libraries are data: a row of names for each. Wrappers (DistributedDataParallel,
torch.compile, activation checkpointing, PEFT) are looked through; FSDP2 wraps nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from ..model.arguments import choices
from ..model.points import POINTS, Layers, Tap, parse_layers
from ..model.transformer import Transformer

# The names under which wrappers keep what they wrap.
_WRAPPED = ("module", "_orig_mod", "_checkpoint_wrapped_module", "base_model.model")


@dataclass(frozen=True)
class Names:
    """The attributes of one library's decoders, with the classes whose arithmetic is known."""

    library: str
    trunk: str  # the module whose pass runs the blocks; "" is the model itself
    blocks: str
    norm: str
    head: str
    attn_norm: str
    attn: str
    mlp_norm: str
    mlp: str
    block_classes: tuple[str, ...]
    norm_classes: tuple[str, ...]


LIBRARIES = (
    Names(
        library="transformers",
        trunk="model",
        blocks="model.layers",
        norm="model.norm",
        head="lm_head",
        attn_norm="input_layernorm",
        attn="self_attn",
        mlp_norm="post_attention_layernorm",
        mlp="mlp",
        block_classes=(
            "LlamaDecoderLayer",
            "MistralDecoderLayer",
            "Qwen2DecoderLayer",
            "Qwen3DecoderLayer",
        ),
        norm_classes=("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"),
    ),
    Names(
        library="torchtitan",
        trunk="",
        blocks="layers",
        norm="norm",
        head="lm_head",
        attn_norm="attention_norm",
        attn="attention",
        mlp_norm="ffn_norm",
        mlp="feed_forward",
        block_classes=("Llama3TransformerBlock", "Qwen3TransformerBlock"),
        norm_classes=("RMSNorm",),
    ),
    Names(
        library="shardlens",
        trunk="",
        blocks="blocks",
        norm="norm",
        head="head",
        attn_norm="attn_norm",
        attn="attn",
        mlp_norm="mlp_norm",
        mlp="mlp",
        block_classes=("Block",),
        norm_classes=("RMSNorm",),
    ),
)


@dataclass(frozen=True)
class Decoder:
    """The parts of a model; a stage of a pipeline has some of the blocks, and perhaps no head.

    model: the whole, out of its wrappers. blocks: by their number in the whole model, as they are
    called, perhaps wrapped.
    """

    model: nn.Module
    names: Names
    blocks: dict[int, nn.Module]
    norm: nn.Module | None
    head: nn.Module | None

    @classmethod
    def of(cls, model: nn.Module) -> Decoder:
        """The parts of a model of LIBRARIES. Raises ValueError naming one that is none of them."""
        if not isinstance(model, nn.Module):
            raise ValueError(f"a model of type {type(model).__name__}: give a torch module")
        for inner in _layers_of_wrapping(model):
            for names in LIBRARIES:
                blocks = _numbered(find(inner, names.blocks))
                if blocks:
                    decoder = cls(
                        inner, names, blocks, find(inner, names.norm), find(inner, names.head)
                    )
                    decoder._check()
                    return decoder
        known = ", ".join(name for names in LIBRARIES for name in names.block_classes)
        raise ValueError(
            f"{type(model).__name__} is no decoder that is known here, whose blocks are one of: "
            f"{known}"
        )

    @property
    def trunk(self) -> nn.Module:
        """The module whose pass runs the blocks."""
        return (
            (find(self.model, self.names.trunk) or self.model) if self.names.trunk else self.model
        )

    @property
    def n_layers(self) -> int:
        """How many blocks the whole model has, of which a stage of a pipeline has some."""
        config = getattr(self.model, "config", None)
        for name in ("num_hidden_layers", "n_layers"):
            if isinstance(getattr(config, name, None), int):
                return int(getattr(config, name))
        layers = getattr(config, "layers", None)
        return len(layers) if isinstance(layers, list) else max(self.blocks) + 1

    def taps(self, points: str | Sequence[str], layers: Layers) -> tuple[Tap, ...]:
        """Points of layers, by layer; "all" layers are those that this stage has.

        Raises ValueError for a point or a layer that does not exist, or is not on this stage.
        """
        named = choices(points, "points", POINTS)
        everything = isinstance(layers, str) and layers == "all"
        found = sorted(self.blocks) if everything else parse_layers(layers, self.n_layers)
        for layer in found:
            if layer not in self.blocks:
                raise ValueError(f"layer {layer} is on another stage of the pipeline")
        return tuple(Tap(layer, point) for layer in found for point in POINTS if point in named)

    @property
    def is_ours(self) -> bool:
        """Whether the model is a `Transformer`."""
        return isinstance(self.model, Transformer)

    def _check(self) -> None:
        for block in self.blocks.values():
            _check_class(unwrapped(block), self.names.block_classes, "block")
        if self.norm is not None:
            _check_class(self.norm, self.names.norm_classes, "final norm")
        if self.head is not None and getattr(self.head, "bias", None) is not None:
            raise ValueError("a head with a bias cannot be read: only W_U of LLaMA and Qwen is")


def unwrapped(module: nn.Module) -> nn.Module:
    """The innermost module of wrappers."""
    return list(_layers_of_wrapping(module))[-1]


def find(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a path of names with dots; None where there is none."""
    found: object = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


def norm_eps(norm: nn.Module) -> float:
    """The epsilon of an RMSNorm; each library has a name of its own."""
    for name in ("variance_epsilon", "eps"):
        eps = getattr(norm, name, None)
        if isinstance(eps, float):
            return eps
    raise ValueError(f"{type(norm).__name__} does not say its epsilon: give (weight, eps, head)")


def _layers_of_wrapping(module: nn.Module) -> Iterator[nn.Module]:
    while True:
        yield module
        inner = (find(module, path) for path in _WRAPPED)
        following = next((each for each in inner if each is not None), None)
        if following is None:
            return
        module = following


def _numbered(blocks: nn.Module | None) -> dict[int, nn.Module]:
    """Blocks by number: those of a list, or of a dict whose keys are the numbers."""
    if isinstance(blocks, nn.ModuleList):
        # a stage of a pipeline may put None where another stage has the block
        return {number: block for number, block in enumerate(blocks) if block is not None}
    if isinstance(blocks, nn.ModuleDict):
        return {int(number): block for number, block in blocks.items() if number.isdigit()}
    return {}


def _check_class(module: nn.Module, known: tuple[str, ...], what: str) -> None:
    # FSDP2 puts a class of its own before the model's
    if not any(each.__name__ in known for each in type(module).__mro__):
        raise ValueError(
            f"a {what} of class {type(module).__name__} is not known here: only "
            f"{', '.join(known)} are"
        )
