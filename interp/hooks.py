"""Functions called at the points of somebody else's decoder, and removed without a trace.

    point       where it is in a block                     read or changed by
    resid_pre   the block's input                          before the block
    attn_norm   the output of its first norm               after the norm
    attn_out    the output of attention                    after attention
    resid_mid   resid_pre + attn_out                       before the second norm; changed as
                                                           attn_out, less resid_pre
    mlp_norm    the output of its second norm              after the norm
    mlp_out     the output of the MLP                      after the MLP
    resid_post  the block's output                         after the block

At resid_pre and resid_post of a block that is compiled by itself (`block.compile()`, as torchtitan
does) functions are called from outside, and its compiled code stays as it is. Inside of compiled
code a function is seen only if it was there when the code was compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from torch import Tensor, nn

from ..model.points import Tap
from ..model.tap_edits import EditFn
from ..model.tap_sink import BothSinks, TapSink
from .decoders import Decoder, find, unwrapped


class Visitor(Protocol):
    """The functions that a pass calls."""

    def begin(self) -> None:
        """A pass begins."""

    def call(self, positions: Tensor | None) -> None:
        """A block is about to run; positions [B or 1, T] where the model passes them on."""

    def visit(self, tap: Tap, x: Tensor) -> Tensor | None:
        """The state x [B, T, d] at a tap; what is returned replaces it."""

    def end(self) -> None:
        """The pass has ended without an error."""


def install(
    decoder: Decoder, taps: Iterable[Tap], visitor: Visitor, table: EditFn | None = None
) -> ExitStack:
    """Have a visitor called by every pass of a model until the stack returned is closed.

    taps: of blocks that the model has. table: for a visitor that changes states, its edits as a
    `Transformer` takes them.
    """
    stack, taps = ExitStack(), list(taps)
    try:
        if decoder.is_ours:
            _install_in_transformer(decoder, taps, visitor, stack, table)
            return stack
        _on(
            decoder.trunk,
            stack,
            before=lambda *_: visitor.begin(),
            after=lambda _: visitor.end(),
        )
        by_layer: dict[int, list[str]] = {}
        for tap in taps:
            by_layer.setdefault(tap.layer, []).append(tap.point)
        for layer, points in by_layer.items():
            _install_in_block(_BlockCall(decoder, layer, visitor), points, stack, table is not None)
    except BaseException:
        stack.close()
        raise
    return stack


class _BlockCall:
    """The functions at the points of one block, and the residual that entered it."""

    def __init__(self, decoder: Decoder, layer: int, visitor: Visitor) -> None:
        self.block, self.layer, self.visitor = decoder.blocks[layer], layer, visitor
        self.names = decoder.names
        self.entered: Tensor | None = None

    def part(self, name: str) -> nn.Module:
        found = find(unwrapped(self.block), name)
        if found is None:
            raise ValueError(f"block {self.layer} has no {name}, where its class should have one")
        return found

    def at_input(self, point: str | None) -> Callable[..., Any]:
        """A function before a module, which visits its first argument."""

        def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if point is None:
                self.visitor.call(_positions(args, kwargs))
                return None
            changed = self.visitor.visit(Tap(self.layer, point), args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)

        return before

    def at_output(self, point: str) -> Callable[[Any], Any]:
        """A function after a module, which visits its output, or the first of several."""

        def after(output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            changed = self.visitor.visit(Tap(self.layer, point), x)
            if changed is None:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return after

    def enter(self, args: tuple[Any, ...], _: dict[str, Any]) -> None:
        self.entered = args[0]

    def at_sum(self, output: Any) -> Any:
        """Change resid_mid by changing the output of attention, which is added to the residual."""
        assert self.entered is not None
        entered, self.entered = self.entered, None
        attn_out = output[0] if isinstance(output, tuple) else output
        changed = self.visitor.visit(Tap(self.layer, "resid_mid"), entered + attn_out)
        if changed is None:
            return None
        changed = changed - entered
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _install_in_block(
    call: _BlockCall, points: Sequence[str], stack: ExitStack, edits: bool
) -> None:
    """Functions in the order in which data passes, so that each sees what those before changed."""
    names, block = call.names, call.block
    _on(block, stack, before=call.at_input(None))
    if "resid_pre" in points:
        _on(block, stack, before=call.at_input("resid_pre"))
    if "attn_norm" in points:
        _on(call.part(names.attn_norm), stack, after=call.at_output("attn_norm"))
    if "attn_out" in points:
        _on(call.part(names.attn), stack, after=call.at_output("attn_out"))
    if "resid_mid" in points and edits:
        _on(unwrapped(block), stack, before=call.enter)
        _on(call.part(names.attn), stack, after=call.at_sum)
    elif "resid_mid" in points:
        _on(call.part(names.mlp_norm), stack, before=call.at_input("resid_mid"))
    if "mlp_norm" in points:
        _on(call.part(names.mlp_norm), stack, after=call.at_output("mlp_norm"))
    if "mlp_out" in points:
        _on(call.part(names.mlp), stack, after=call.at_output("mlp_out"))
    if "resid_post" in points:
        _on(block, stack, after=call.at_output("resid_post"))


def _on(
    module: nn.Module,
    stack: ExitStack,
    *,
    before: Callable[..., Any] | None = None,
    after: Callable[[Any], Any] | None = None,
) -> None:
    """Call functions before and after a module; what they return replaces its input or output."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        _around_compiled(module, stack, before, after)
        return
    if before is not None:
        first = before
        stack.callback(
            module.register_forward_pre_hook(
                lambda _, args, kwargs: first(args, kwargs), with_kwargs=True
            ).remove
        )
    if after is not None:
        last = after
        stack.callback(module.register_forward_hook(lambda _, args, output: last(output)).remove)


def _around_compiled(
    module: nn.Module,
    stack: ExitStack,
    before: Callable[..., Any] | None,
    after: Callable[[Any], Any] | None,
) -> None:
    compiled: Callable[..., Any] = module._compiled_call_impl  # type: ignore[assignment]

    def call(*args: Any, **kwargs: Any) -> Any:
        changed = None if before is None else before(args, kwargs)
        if changed is not None:
            args, kwargs = changed
        output = compiled(*args, **kwargs)
        changed = None if after is None else after(output)
        return output if changed is None else changed

    module._compiled_call_impl = call
    stack.callback(setattr, module, "_compiled_call_impl", compiled)


def _positions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Absolute positions [B or 1, T] that a model hands its blocks.

    transformers: position_ids; torchtitan: the third argument, after the masks.
    """
    found = kwargs.get("position_ids", kwargs.get("positions"))
    if found is None and len(args) > 2:
        found = args[2]
    return found if isinstance(found, Tensor) else None


class _VisitingSink(TapSink):
    """The sink that a pass of a `Transformer` hands its states to."""

    def __init__(self, taps: Sequence[Tap], visitor: Visitor) -> None:
        self.by_canonical: dict[Tap, list[Tap]] = {}
        self.visitor = visitor
        for tap in taps:
            self.by_canonical.setdefault(tap.canonical, []).append(tap)

    def read(self, tap: Tap, x: Tensor) -> None:
        for each in self.by_canonical.get(tap, ()):
            self.visitor.visit(each, x)


def _install_in_transformer(
    decoder: Decoder, taps: Sequence[Tap], visitor: Visitor, stack: ExitStack, table: EditFn | None
) -> None:
    """A `Transformer` takes what reads and edits its states as arguments of its pass."""

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        visitor.begin()
        if table is not None:
            return args, kwargs | {"edits": _after(kwargs.get("edits"), table)}
        sink = _VisitingSink(taps, visitor)
        others = kwargs.get("sink")
        return args, kwargs | {"sink": sink if others is None else BothSinks(others, sink)}

    _on(decoder.model, stack, before=before, after=lambda _: visitor.end())


def _after(first: EditFn | None, second: EditFn) -> EditFn:
    """The edits of one table, and then those of another."""
    if first is None:
        return second
    return lambda positions: first(positions).then(second(positions))
