"""Expressions over fields of a configuration, e.g. `batch_size * input_size_px ** 2 <= 3.3e6`: a small part of Python's, evaluated node by node.

Whatever is not listed here is refused when it is parsed: there is no way from an expression to anything but the fields that it names.
"""

import ast
import operator
from collections.abc import Callable, Iterator
from typing import Any

_LONGEST, _DEEPEST = 500, 30
# Larger powers are no constraint but a way to keep a machine busy.
_LARGEST_BASE, _LARGEST_EXPONENT = 1e9, 64

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda value, among: value in among,
    ast.NotIn: lambda value, among: value not in among,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "abs": abs}


class Expression:
    """A parsed expression.

    Parameters
    ----------
    text : str

    Attributes
    ----------
    text : str
    names : list of str
        Fields that it names, dotted, in order of appearance.

    Raises
    ------
    ValueError
        It is too long, no expression, or holds what is not understood; one line.
    """

    def __init__(self, text: str) -> None:
        if len(text) > _LONGEST:
            raise ValueError(f"an expression of {len(text)} characters; at most {_LONGEST}")
        try:
            self._root = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{text!r} is not an expression") from error
        self.text = text
        self.names = list(dict.fromkeys(_checked(self._root, text, 0)))

    def __call__(self, lookup: Callable[[str], Any]) -> Any:
        """Return its value, where `lookup` returns that of a field; ValueError, one line, where there is none (a division by zero, for instance)."""
        try:
            return _value(self._root, lookup)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise ValueError(f"{self.text!r} has no value ({error})") from error


def _checked(node: ast.expr, text: str, depth: int) -> Iterator[str]:
    """Yield the names in an expression; ValueError for what is not understood."""
    if depth > _DEEPEST:
        raise ValueError(f"{text!r} is nested too deeply")
    match node:
        case ast.Name() | ast.Attribute():
            yield _dotted(node, text)
            return
        case ast.Constant(value=value) if value is None or type(value) in (int, float, str, bool):
            return
        case ast.BoolOp(values=parts):
            # Of `arch == 'a' or 'b'` the second half would always hold; refused here, since it is only come to where the first half does not.
            if (wrong := next((part for part in parts if _is_no_truth(part)), None)) is not None:
                raise ValueError(f"{text!r}: {ast.unparse(wrong)!r} between and/or is neither true nor false")
            inner = parts
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            inner = parts
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            inner = [operand]
        case ast.BinOp(left=left, op=kind, right=right) if type(kind) in _ARITHMETIC:
            inner = [left, right]
        case ast.Compare(left=left, ops=kinds, comparators=others) if all(type(kind) in _COMPARISONS for kind in kinds):
            inner = [left, *others]
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS and arguments:
            inner = arguments
        case _:
            raise ValueError(f"{text!r}: {ast.unparse(node)!r} is not understood; comparisons, and/or/not/in, + - * / // % **, min, max, abs are")
    for part in inner:
        yield from _checked(part, text, depth + 1)


def _is_no_truth(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=value):
            return not isinstance(value, bool)
        case ast.UnaryOp(op=kind):
            return isinstance(kind, ast.USub)
    return isinstance(node, ast.BinOp | ast.List | ast.Tuple | ast.Call)


def _dotted(node: ast.expr, text: str) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=inner, attr=name):
            return f"{_dotted(inner, text)}.{name}"
    raise ValueError(f"{text!r}: {ast.unparse(node)!r} is not the name of a field")


def _value(node: ast.expr, lookup: Callable[[str], Any]) -> Any:
    match node:
        case ast.Name() | ast.Attribute():
            return lookup(_dotted(node, ""))
        case ast.Constant(value=value):
            return value
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_value(part, lookup) for part in parts]
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_truth(_value(part, lookup)) for part in parts)
        case ast.BoolOp(values=parts):
            return any(_truth(_value(part, lookup)) for part in parts)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _truth(_value(operand, lookup))
        case ast.UnaryOp(operand=operand):
            return -_number(_value(operand, lookup))
        case ast.BinOp(left=left, op=kind, right=right):
            first, second = _number(_value(left, lookup)), _number(_value(right, lookup))
            if isinstance(kind, ast.Pow) and not (abs(first) <= _LARGEST_BASE and abs(second) <= _LARGEST_EXPONENT):
                raise ValueError("a power too large")
            return _ARITHMETIC[type(kind)](first, second)
        case ast.Compare(left=left, ops=kinds, comparators=others):
            before = _value(left, lookup)
            for comparison, other in zip(kinds, others, strict=True):
                after = _value(other, lookup)
                if not _COMPARISONS[type(comparison)](before, after):
                    return False
                before = after
            return True
        case ast.Call(func=ast.Name(id=name), args=arguments):
            values = [_value(argument, lookup) for argument in arguments]
            if name != "abs" and len(values) == 1 and isinstance(values[0], list | tuple):
                values = list(values[0])
            return _FUNCTIONS[name](*map(_number, values))
    raise ValueError("not understood")


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return value
