"""The faults that can be planted in a source text, one at a time.

Each is a small change of meaning that a careless edit might make: a comparison turned or moved by one at its boundary,
a sign changed, a term or a call left out, a constant changed, a condition ignored. What only words a message is left
alone (annotations, docstrings, f-strings, what stands in a `raise` or a warning), and so are assertions.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass


COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
"""For an order its boundary and its opposite."""
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
TERMS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.BitOr, ast.BitAnd)
"""Operators of which the right operand may be left out, and of all but these the left one too."""
ONE_SIDED = (ast.Sub, ast.Div)
SWAPS = {"all": "any", "amax": "amin", "argmax": "argmin", "ceil": "floor", "max": "min", "mean": "sum"}
SWAPS |= {other: name for name, other in SWAPS.items()}
DROPPED = {"abs", "ceil", "clamp", "clip", "detach", "exp", "floor", "relu", "round", "sigmoid", "sorted", "sqrt"}
"""Calls that give back something of the kind that they were given."""
DECORATORS = {"torch.no_grad()", "torch.inference_mode()"}
MODULES = {"F", "functional", "math", "np", "numpy", "torch"}


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    Attributes:
        function: where it is planted, such as `Half.take`; `-` for the file's own statements.
        line: its line in the source, from 1.
        span: first and last line of the function or method it stands in, decorators included; None outside of any.
        before, after: the text that is replaced, and what stands there instead.
        start, end: positions of `before` in the source, in bytes.
        number: tells faults apart that read the same in one function.
    """

    function: str
    line: int
    span: tuple[int, int] | None
    before: str
    after: str
    start: int
    end: int
    number: int = 0

    @property
    def name(self) -> str:
        """The same wherever the function stands in its file."""
        repeated = f" (no {self.number + 1})" if self.number else ""
        return f"{self.function}: {_one_line(self.before)} -> {_one_line(self.after)}{repeated}"

    def plant(self, source: str) -> str:
        """`source` with the fault in it."""
        content = source.encode()
        return (content[: self.start] + self.after.encode() + content[self.end :]).decode()


def faults_of(source: str) -> list[Fault]:
    """Every fault that can be planted in `source`, in the order of their places; no two give the same program."""
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    programs = {ast.dump(ast.parse(source))}
    faults: list[Fault] = []
    for fault in sorted(finder.faults, key=lambda fault: (fault.start, fault.end, fault.after)):
        try:
            program = ast.dump(ast.parse(fault.plant(source)))
        except SyntaxError:
            continue
        if program not in programs:
            programs.add(program)
            alike = sum(other.name.split(" (no ")[0] == fault.name for other in faults)
            faults.append(Fault(**(vars(fault) | {"number": alike})))
    return faults


class _Finder(ast.NodeVisitor):
    def __init__(self, source: str) -> None:
        self.source = source.encode()
        lines = self.source.splitlines(keepends=True)
        self.line_starts = [0]
        for line in lines:
            self.line_starts.append(self.line_starts[-1] + len(line))
        self.scope: list[str] = []
        self.span: tuple[int, int] | None = None
        self.assigned: list[set[str]] = [set()]
        self.faults: list[Fault] = []

    def replace(self, node: ast.expr | ast.stmt, new: ast.expr | ast.stmt | str) -> None:
        text = new if isinstance(new, str) else ast.unparse(ast.fix_missing_locations(new))
        if isinstance(node, ast.expr):
            text = f"({text})"
        start = self.line_starts[node.lineno - 1] + node.col_offset
        end = self.line_starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        before = self.source[start:end].decode()
        self.faults.append(Fault(".".join(self.scope) or "-", node.lineno, self.span, before, text, start, end))

    # What is left alone.

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_Assert(self, node: ast.Assert) -> None:
        pass

    def visit_Import(self, node: ast.Import) -> None:
        pass

    def visit_keyword(self, node: ast.keyword) -> None:
        # `strict` of `zip` asserts that lengths agree, and no caller makes them differ.
        if node.arg != "strict":
            self.visit(node.value)

    # Scopes.

    def _body(self, body: list[ast.stmt]) -> None:
        for number, statement in enumerate(body):
            docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if not docstring:
                self._drop(statement, body[:number])
                self.visit(statement)

    def visit_Module(self, node: ast.Module) -> None:
        self._body(node.body)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.scope.append(node.name)
        self._body(node.body)
        self.scope.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = self.span
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        self.span = outer or (first, node.end_lineno or first)
        self.scope.append(node.name)
        self.assigned.append({arg.arg for arg in [*node.args.args, *node.args.kwonlyargs]})
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        for decorator in node.decorator_list:
            if ast.unparse(decorator) in DECORATORS:
                self.replace(decorator, "lambda function: function")
        self._body(node.body)
        self.assigned.pop()
        self.scope.pop()
        self.span = outer

    # Statements.

    def _drop(self, statement: ast.stmt, earlier: list[ast.stmt]) -> None:
        """Leave out a statement without which the program still runs."""
        if isinstance(statement, ast.Expr) and isinstance(statement.value, (ast.Call, ast.Await)):
            if not _is_message(statement.value):
                self.replace(statement, "pass")
        elif isinstance(statement, (ast.AugAssign, ast.Delete)):
            self.replace(statement, "pass")
        elif isinstance(statement, ast.Assign):
            names = {target.id for target in statement.targets if isinstance(target, ast.Name)}
            stored = all(isinstance(target, (ast.Attribute, ast.Subscript)) for target in statement.targets)
            if self.scope and (stored or (names and names <= self.assigned[-1])):
                self.replace(statement, "pass")
            self.assigned[-1] |= names

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if isinstance(node.target, ast.Name) and self.scope:
            self.assigned[-1].add(node.target.id)
        if node.value is not None:
            self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            return
        self._condition(node.test, never=not node.orelse)
        self.visit(node.test)
        self._body(node.body)
        self._body(node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.replace(node, node.body)
        self.replace(node, node.orelse)
        self.generic_visit(node)

    def _condition(self, test: ast.expr, never: bool) -> None:
        if never:
            self.replace(test, "False")
        turned = isinstance(test, ast.UnaryOp) or (isinstance(test, ast.Compare) and len(test.ops) == 1)
        if not turned:
            self.replace(test, ast.UnaryOp(ast.Not(), test))

    def _loop(self, node: ast.For | ast.While) -> None:
        self.visit(node.iter if isinstance(node, ast.For) else node.test)
        self._body(node.body)
        self._body(node.orelse)

    visit_For = _loop
    visit_While = _loop

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self.visit(item.context_expr)
        self._body(node.body)

    def visit_Try(self, node: ast.Try) -> None:
        for body in (node.body, *(handler.body for handler in node.handlers), node.orelse, node.finalbody):
            self._body(body)

    def visit_Break(self, node: ast.Break) -> None:
        self.replace(node, "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self.replace(node, "break")

    # Expressions.

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.replace(test, "True")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for position, operator in enumerate(node.ops):
            others = COMPARISONS[type(operator)]
            for other in others[:1] if len(node.ops) > 1 else others:
                changed = copy.deepcopy(node)
                changed.ops[position] = other()
                self.replace(node, changed)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        of_types = isinstance(node.op, ast.BitOr) and self.span is None
        if not of_types and not _is_text(node.left) and not _is_text(node.right):
            other = OPERATORS.get(type(node.op))
            if other is not None:
                self.replace(node, ast.BinOp(node.left, other(), node.right))
            if isinstance(node.op, TERMS):
                self.replace(node, node.left)
                if not isinstance(node.op, ONE_SIDED):
                    self.replace(node, node.right)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if not isinstance(node.op, ast.UAdd):
            self.replace(node, node.operand)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self.replace(node, ast.BoolOp(other, node.values))
        for position in range(len(node.values)):
            rest = node.values[:position] + node.values[position + 1 :]
            self.replace(node, rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if _is_message(node):
            return
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        builtin = isinstance(function, ast.Name)
        if name in SWAPS and not (builtin and name == "sum"):
            changed = copy.deepcopy(node)
            if isinstance(changed.func, ast.Attribute):
                changed.func.attr = SWAPS[name]
            elif isinstance(changed.func, ast.Name):
                changed.func.id = SWAPS[name]
            self.replace(node, changed)
        if name in DROPPED:
            on_object = isinstance(function, ast.Attribute) and ast.unparse(function.value) not in MODULES
            inner = (
                function.value if on_object and isinstance(function, ast.Attribute) else next(iter(node.args), None)
            )
            if inner is not None:
                self.replace(node, inner)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.replace(node, str(not value))
        elif isinstance(value, int):
            self.replace(node, str(value + 1))
        elif isinstance(value, float):
            self.replace(node, repr(1.1 * value if value else 1.0))


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_message(node: ast.expr) -> bool:
    """Whether it only warns or prints."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "print", "logger.warning")


def _one_line(text: str) -> str:
    return " ".join(text.split())
