"""A user's function as Numba is to see it: its digest, its translation, and what is wrong with it.

The translation is a copy of the function whose globals, closure and constants have been exchanged: functions
of `math` and NumPy for those of `elementary`, Python's floats for numbers of the compute dtype (Numba takes
them for float64, and all that they meet becomes float64), functions that it calls for their translations. Its
code stays as it is.
"""

from __future__ import annotations

import builtins
import hashlib
import operator
import re
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numba
import numpy as np
from numba.core import ir
from numba.core.dispatcher import Dispatcher
from numba.core.errors import NumbaError

ALLOWED = (
    "it may use numbers, its arguments, arrays by index, if, for and while, functions of math and NumPy on "
    "numbers, and functions that keep to this too"
)


def _names(code: CodeType) -> set[str]:
    """Every global and attribute that a function's code and the functions within it name."""
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def digest(function: Any, argument_types: Any) -> tuple[str, list[Any]]:
    """A digest of all that decides what a function computes, and the objects that it knows by identity alone.

    Code, constants, and the globals and closure that it reads, by content; functions that it calls likewise.
    """
    parts = [repr(argument_types)]
    met: dict[int, int] = {}
    kept: list[Any] = []

    def add(x: Any, names: set[str]) -> None:
        kind = type(x).__name__
        x = getattr(x, "py_func", x) if isinstance(x, Dispatcher) else x
        if x is None or isinstance(x, (bool, int, float, complex, str, bytes, type(...), numba.types.Type)):
            parts.append(f"{kind} {x!r}")
        elif isinstance(x, (np.ndarray, np.generic)) and not x.dtype.hasobject:
            content = hashlib.sha256(x.tobytes()).hexdigest()
            parts.append(f"{kind} {x.dtype.str} {x.shape} {content}")
        elif isinstance(x, tuple):
            parts.append(f"{kind} {len(x)}")
            for y in x:
                add(y, names)
        elif isinstance(x, CodeType):
            parts.append(repr((x.co_code, x.co_names, x.co_varnames, x.co_freevars, x.co_cellvars,
                               x.co_argcount, x.co_flags)))  # fmt: skip
            add(x.co_consts, names)
        elif isinstance(x, ModuleType):
            parts.append(f"module {x.__name__}")
            if id(x) not in met:
                met[id(x)] = len(met)
                add_named(vars(x), names)
        elif isinstance(x, FunctionType):
            parts.append(f"function {met.get(id(x))}")
            if id(x) not in met:
                met[id(x)] = len(met)
                names = _names(x.__code__)
                add(x.__code__, names)
                add_named(x.__globals__, names)
                for cell in x.__closure__ or ():
                    add(_content(cell), names)
                if x is not function:
                    add(x.__defaults__, names)
        elif isinstance(x, (type, BuiltinFunctionType, np.ufunc)) or _is_public(x):
            parts.append(f"{kind} {getattr(x, '__module__', '')} {getattr(x, '__qualname__', x.__name__)}")
        else:
            parts.append(f"{kind} {id(x)}")
            kept.append(x)

    def add_named(values: Any, names: set[str]) -> None:
        for name in sorted(names):
            if name in values:
                parts.append(name)
                add(values[name], names)

    add(function, set())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest(), kept


def _is_public(x: Any) -> bool:
    """Whether an object is what its module has under its name."""
    name = getattr(x, "__name__", None)
    return isinstance(name, str) and getattr(np, name, None) is x


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return None


def translate(function: Any, jit: Any, stand_ins: dict[Any, Any], dtype: Any) -> Any:
    """The function, compiled by `jit` when it is called, computing in `dtype`."""
    made: dict[int, Any] = {}

    def exchange(x: Any, names: set[str]) -> Any:
        if type(x) is float:
            return x if dtype is np.float64 else dtype(x)
        if isinstance(x, tuple):
            items = [exchange(y, names) for y in x]
            return type(x)(*items) if hasattr(x, "_fields") else tuple(items)
        if isinstance(x, CodeType):
            return x.replace(co_consts=exchange(x.co_consts, names))
        if isinstance(x, ModuleType):
            return twin_of_module(x, names)
        if x is float:
            return dtype
        if isinstance(x, (np.ndarray, np.generic)) and x.dtype.name in ("float16", "bfloat16"):
            return x.astype(np.float32)  # as those of mod_args
        try:
            if x in stand_ins:
                return stand_ins[x]
        except (TypeError, ValueError):  # what cannot be hashed, or compared
            return x
        return twin(x) if isinstance(x, (FunctionType, Dispatcher)) else x

    def twin_of_module(module: ModuleType, names: set[str]) -> ModuleType:
        if id(module) not in made:
            made[id(module)] = result = ModuleType(module.__name__)
            for name in names:
                if hasattr(module, name):
                    setattr(result, name, exchange(getattr(module, name), names))
        return made[id(module)]

    def twin(f: Any) -> Any:
        f = getattr(f, "py_func", f)
        if id(f) not in made:
            names = _names(f.__code__)
            # A kept kernel imports the module that it names: not one that other scripts may not have.
            values = {"__name__": __name__, "__builtins__": builtins}
            cells = tuple(CellType() for _ in f.__closure__ or ())
            defaults = None if f is function else exchange(f.__defaults__, names)
            copy = FunctionType(exchange(f.__code__, names), values, f.__name__, defaults, cells)
            copy.__qualname__ = f.__qualname__
            # What it calls may call it again.
            made[id(f)] = jit(copy)
            for name in names:
                if name in f.__globals__:
                    values[name] = exchange(f.__globals__[name], names)
                elif name == "float":
                    values[name] = dtype
                elif name == "print":  # would compile, and wait for the interpreter with each score
                    values[name] = name
            for cell, old in zip(cells, f.__closure__ or (), strict=True):
                cell.cell_contents = exchange(_content(old), names)
        return made[id(f)]

    return twin(function)


def compiled(translation: Any, types: tuple[Any, ...], function: Any, label: str) -> Any:
    """Compile a translation for arguments of these Numba types; the type that it returns."""
    try:
        folded = translation.get_call_template(types, {})[2]  # *args are one
    except Exception as error:  # not only Numba's own: what it does not expect ends in one of any kind
        reason, line = _reason(error, function.__code__)
        msg = f"{label} cannot be compiled: {reason}{line}; {ALLOWED}"
        raise ValueError(msg) from None
    for is_wrong, reason, remedy in (
        (_is_integer_power, "for Numba an int to the power of an int is an int, 0 for powers below 0",
         "write a base of float, as 2.0 ** -x"),
        (_is_sum_of_bools, "it computes with bools as if they were numbers",
         "write and, or, not, or int(x) of each"),
    ):  # fmt: skip
        if number := _line_where(is_wrong, translation, set()):
            msg = f"{label} cannot be compiled: {reason} (line {number}); {remedy}"
            raise ValueError(msg)
    return translation.overloads[tuple(folded)].signature.return_type


def _line_where(is_wrong: Any, function: Any, met: set[int]) -> int:
    """The line where an expression of a compiled function, or of one that it calls, is wrong, or 0."""
    met.add(id(function))
    for result in function.overloads.values():
        kinds, calls = result.type_annotation.typemap, result.type_annotation.calltypes
        for x, signature in calls.items():
            if isinstance(x, ir.Expr) and is_wrong(x, getattr(signature, "return_type", None), kinds):
                return int(x.loc.line)
        called = (t.dispatcher for t in kinds.values() if isinstance(t, numba.types.Dispatcher))
        for other in called:
            line = 0 if id(other) in met else _line_where(is_wrong, other, met)
            if line:
                return line
    return 0


def _is_integer_power(x: ir.Expr, returns: Any, kinds: Any) -> bool:
    """Powers that are known and not negative are as in Python."""
    if not isinstance(returns, numba.types.Integer):
        return False
    if x.op in ("binop", "inplace_binop"):
        is_power = x.fn in (operator.pow, operator.ipow)
        return is_power and not getattr(kinds[x.rhs.name], "literal_value", -1) >= 0
    return x.op == "call" and getattr(kinds[x.func.name], "typing_key", None) is pow


def _is_sum_of_bools(x: ir.Expr, returns: Any, kinds: Any) -> bool:
    """Numba makes ints of them; for NumPy, and so for the reference, True + True is True, -True an error."""
    if x.op in ("binop", "inplace_binop"):
        return x.fn in _ARITHMETIC and all(_is_bool(kinds[y.name]) for y in (x.lhs, x.rhs))
    return x.op == "unary" and x.fn in (operator.neg, operator.pos) and _is_bool(kinds[x.value.name])


def _is_bool(kind: Any) -> bool:
    return isinstance(kind, numba.types.Boolean)


_ARITHMETIC = {
    getattr(operator, prefix + name)
    for name in ("add", "sub", "mul", "pow", "floordiv", "mod", "lshift", "rshift")
    for prefix in ("", "i")
}


def _reason(error: Exception, code: CodeType) -> tuple[str, str]:
    """What Numba says in one line, and where in the function."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    place = re.search(rf'File "[^"]*?{re.escape(code.co_filename.rpartition("/")[2])}", line (\d+)', text)
    lines = [x.strip() for x in text.splitlines() if x.strip() and not x.startswith("Failed in ")]
    reason = lines[0] if lines else type(error).__name__
    if not isinstance(error, NumbaError | NotImplementedError):
        reason = f"Numba fails with {type(error).__name__}: {reason}"
    if "NRT required" in reason:
        reason = "it makes a list, an array or a string"
    if reason.endswith(":") and len(lines) > 1:
        reason += f" {lines[1].lstrip('> ')}"
    if "Literal[str](print)" in reason:
        reason = "it calls print"
    if "<intrinsic power>" in reason:
        reason = "it calls np.power of two ints; write x ** n for a known n, or make the base a float"
    if "(Literal[str](" in reason:
        reason = "it makes a number of a string, as float('inf') does; write math.inf"
    return reason.rstrip(".;:"), f" (line {place[1]})" if place else ""
