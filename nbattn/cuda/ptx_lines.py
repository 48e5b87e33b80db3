"""How PTX becomes functions that Numba's CUDA target compiles: what `ptx` and `ptx_hopper` are made with."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from llvmlite import ir
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

if TYPE_CHECKING:
    int32: TypeAlias = int
    int64: TypeAlias = int
    float32: TypeAlias = float
    boolean: TypeAlias = bool
else:
    int32, int64, float32, boolean = types.int32, types.int64, types.float32, types.boolean

I1, I8, I32, I64, F32 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()


def asm(b: Any, results: list[Any], arguments: list[Any], text: str, constraints: str, stays: bool) -> Any:
    """Inline PTX: its results. `stays` says that it must stay: it has effects, or reads what others write."""
    result = results[0] if len(results) == 1 else ir.LiteralStructType(results)
    result = result if results else ir.VoidType()
    function = ir.FunctionType(result, [x.type for x in arguments])
    if stays:
        constraints = ",".join(filter(None, (constraints, "~{memory}")))
    # What a warp does together must not move to where only some of its threads come.
    together = ("convergent",) if any(x in text for x in (".sync", "bar.")) else ()
    value = b.call(ir.InlineAsm(function, text, constraints, side_effect=stays), arguments, attrs=together)
    if len(results) > 1:
        return [b.extract_value(value, i) for i in range(len(results))]
    return [value] if results else []


def emitted(name: str, about: str | None, result: Any, arguments: dict[str, Any], emit: Any) -> Any:
    """The function of this name that becomes what ``emit(context, builder, types, values)`` emits.

    An argument's type None takes what it is given.
    """

    def define(typingctx: Any, *given: Any) -> Any:
        wanted = zip(arguments.values(), given, strict=True)
        signature = result(*(have if want is None else want for want, have in wanted))

        def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
            value = emit(context, b, signature.args, list(values))
            return context.get_dummy_value() if value is None else value

        return signature, codegen

    kind = inspect.Parameter.POSITIONAL_ONLY
    parameters = [inspect.Parameter(x, kind) for x in ("typingctx", *arguments)]
    define.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    define.__name__, define.__doc__ = name, about
    return intrinsic(define)


def one_line(text: str, constraints: str, stays: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """The intrinsic of one line of PTX on scalars, of which the function's annotations say the types."""

    def make(function: Callable[..., Any]) -> Any:
        arguments = dict(function.__annotations__)
        result = arguments.pop("return")

        def emit(context: Any, b: Any, _: Any, values: list[Any]) -> Any:
            values = [b.zext(x, I32) if x.type == I1 else x for x in values]
            if result is None:
                asm(b, [], values, text, constraints, stays)
                return None
            kind = I32 if result == boolean else context.get_value_type(result)
            (value,) = asm(b, [kind], values, text, constraints, stays)
            return b.icmp_signed("!=", value, ir.Constant(I32, 0)) if result == boolean else value

        kind = types.void if result is None else result
        return emitted(function.__name__, function.__doc__, kind, arguments, emit)

    return make


def element(context: Any, b: Any, array_type: Any, array: Any, index: Any, step: int) -> Any:
    """Where the element `step` after an index of a `cuda.local.array` lies."""
    data = cgutils.create_struct_proxy(array_type)(context, b, value=array).data
    return b.gep(data, [b.add(index, ir.Constant(index.type, step))], inbounds=True)
