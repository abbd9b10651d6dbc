"""The syntax tree of a chat template: what may stand in it, and where its work is counted."""

from __future__ import annotations

from collections.abc import Iterator

from jinja2 import nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.visitor import NodeTransformer

from kvq.runtime.text.allowance import MOST_BITS

MOST_NODES = 8_000  # the longest published templates have 5,000; compiling this many takes a fifth of a second
MOST_TOKENS = 3 * MOST_NODES  # of the source, which are counted while it is read; published ones have two for a node
# What a template is made of. Anything else (inheritance, includes, blocks) reaches beyond it.
ALLOWED = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock,
    nodes.FilterBlock, nodes.With, nodes.Assign, nodes.AssignBlock, nodes.Scope, nodes.Break, nodes.Continue,
    nodes.Name, nodes.NSRef, nodes.Const, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair, nodes.Keyword,
    nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice, nodes.Concat,
    nodes.Compare, nodes.Operand, nodes.BinExpr, nodes.UnaryExpr,
)  # fmt: skip
# Names of what is put into the tree, as filters that no template may use: they say what an allowance loses. With
# parentheses they are no names in a template's source, and as text (`map("(spent)")`) the environment refuses them.
COMPARED, CONCATENATED, COUNTED, HASHED = "(compared)", "(concatenated)", "(counted)", "(hashed)"
SHOWN, SLICED, SPENT = "(shown)", "(sliced)", "(spent)"
# Their bodies run more than once, or later: they take their own steps.
REPEATED = (nodes.For, nodes.Macro, nodes.CallBlock)
CONTAINERS = (nodes.List, nodes.Tuple, nodes.Dict)
# Steps of an expression, by what it costs beside an ordinary one.
STEPS_OF_A_CONTAINER, STEPS_OF_AN_OPERATION, STEPS_OF_A_ROUND = 8, 5, 12
OPERATIONS = (nodes.Filter, nodes.Test, nodes.Call, nodes.Getattr, nodes.Getitem, nodes.Compare, nodes.Concat,
              nodes.Add, nodes.Mul)  # fmt: skip


class Generation(Extension):
    """`{% generation %}` marks replies for training; here it is what it contains."""

    tags = {"generation"}  # noqa: RUF012 # as jinja2 declares it

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        """The template's tokens, as long as there are not too many of them."""
        for count, token in enumerate(stream):
            if count > MOST_TOKENS:
                raise TemplateSyntaxError(f"more than {MOST_TOKENS} tokens", token.lineno)
            yield token

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def counting(tree: nodes.Template) -> nodes.Template:
    """The tree with everything that can take long, or make much, as a filter of `kvq.runtime.text.operations`.

    Raises:
        TemplateSyntaxError: it holds what no chat template needs, or too much.
    """
    for count, node in enumerate(walk(tree)):
        if count > MOST_NODES:
            raise TemplateSyntaxError(f"more than {MOST_NODES} expressions", node.lineno or 1)
        if not isinstance(node, ALLOWED):
            raise TemplateSyntaxError(f"{type(node).__name__} is not known", node.lineno or 1)
        if isinstance(node, nodes.Filter | nodes.Test) and not callable_by_template(node.name):
            raise TemplateSyntaxError(f"no filter or test can have the name {node.name!r:.80}", node.lineno or 1)
        if isinstance(node, nodes.Const) and isinstance(node.value, int) and node.value.bit_length() > MOST_BITS:
            raise TemplateSyntaxError(f"an integer of more than {MOST_BITS} bits", node.lineno or 1)
    return Counting().visit(tree)


def callable_by_template(name: object) -> bool:
    """Whether it is a name that a template may call a filter or a test by; not those that are put into the tree.

    Anything else that is looked up has to be hashed, and a tuple may hold itself many times.
    """
    return isinstance(name, str) and not name.startswith("(")


def walk(node: nodes.Node) -> Iterator[nodes.Node]:
    """A node and all below it, without recursion."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(node.iter_child_nodes())


def cost(parts: list[nodes.Node]) -> tuple[int, int]:
    """Steps of running these once, and characters of their text; bodies that take their own are left out."""
    waiting, count, text = list(parts), 0, 0
    while waiting:
        node = waiting.pop()
        count += 1
        if isinstance(node, nodes.TemplateData):
            text += len(node.data)
        if isinstance(node, CONTAINERS):
            count += STEPS_OF_A_CONTAINER
        elif isinstance(node, OPERATIONS):
            count += STEPS_OF_AN_OPERATION
        if isinstance(node, REPEATED):
            count += STEPS_OF_A_CONTAINER  # of the loop itself
            once = (node.iter,) if isinstance(node, nodes.For) else ()
            waiting.extend(once)
            continue
        waiting.extend(node.iter_child_nodes())
    return count, text


def _filter(value: nodes.Node, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(arguments), [], None, None, lineno=value.lineno)


class Counting(NodeTransformer):
    """Names in parentheses are those of `kvq.runtime.text.operations`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """A step for each expression in each round (counted, spent)."""
        if node.recursive and node.test is not None:
            raise TemplateSyntaxError("a recursive loop has a condition", node.lineno)
        test = STEPS_OF_A_ROUND + (cost([node.test])[0] if node.test is not None else 0)
        body = cost(node.body)
        self.generic_visit(node)
        node.iter = _filter(node.iter, COUNTED, nodes.Const(test, lineno=node.lineno))
        return _spending(node, body)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        """As in a loop, in each call."""
        body = cost([*node.body, *node.defaults])
        self.generic_visit(node)
        return _spending(node, body)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        """As a macro."""
        body = cost([*node.body, *node.defaults])
        self.generic_visit(node)
        return _spending(node, body)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        """What is shown is made text (shown)."""
        self.generic_visit(node)
        node.nodes = [part if isinstance(part, nodes.TemplateData) else _filter(part, SHOWN) for part in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """The operator ~ (concatenated)."""
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), CONCATENATED)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Comparisons, and `in` (compared)."""
        self.generic_visit(node)
        pairs = [part for each in node.ops for part in (nodes.Const(each.op, lineno=node.lineno), each.expr)]
        return _filter(node.expr, COMPARED, *pairs)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """Slices, which jinja2 leaves to Python (sliced)."""
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        none = nodes.Const(None, lineno=node.lineno)
        return _filter(node.node, SLICED, node.arg.start or none, node.arg.stop or none, node.arg.step or none)

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        """Keys of dictionaries, which are hashed (hashed)."""
        self.generic_visit(node)
        node.key = _filter(node.key, HASHED)
        return node


def _spending(node: nodes.For | nodes.Macro | nodes.CallBlock, body: tuple[int, int]) -> nodes.Node:
    """The node, whose body takes so many steps and characters whenever it runs."""
    count, text = (nodes.Const(value, lineno=node.lineno) for value in body)
    node.body = [nodes.ExprStmt(_filter(count, SPENT, text), lineno=node.lineno), *node.body]
    return node
