"""Calls that count, put into a parsed template where jinja2 has no hook of its own.

They stand at the head of loops and macros, and around literals, slices, comparisons and joined
texts. They are filters with names that no template can spell.
"""

from __future__ import annotations

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

STEP, KEEP, PART = "count a step", "count a value", "count a part"


class Counting(NodeTransformer):
    """Puts the filters that count into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, _step_of(node))
        if node.test is not None:
            step = _filtered(nodes.Const(0), STEP, node)
            node.test = nodes.And(step, node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self.generic_visit(node)
        node.body.insert(0, _step_of(node))
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:
        self.generic_visit(node)
        step = _filtered(nodes.Const(0), STEP, node)
        return nodes.And(step, node, lineno=node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        node.nodes = [_filtered(part, PART, node) for part in node.nodes]
        return _filtered(node, KEEP, node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, KEEP, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, KEEP, node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, KEEP, node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, KEEP, node) if node.ctx == "load" else node


def _filtered(node: nodes.Expr, name: str, at: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=at.lineno)


def _step_of(node: nodes.Node) -> nodes.ExprStmt:
    """A step, with the memory of the list that the body's outputs are added to."""
    n_outputs = sum(len(output.nodes) for output in node.find_all(nodes.Output))
    step = _filtered(nodes.Const(8 * n_outputs), STEP, node)
    return nodes.ExprStmt(step, lineno=node.lineno)
