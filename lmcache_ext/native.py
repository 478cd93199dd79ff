"""Compiled code that holds no GIL and may call C functions, kept on disk between starts.

numba can't keep what has an address built in, and compiling takes two seconds of every engine's start. So functions are
called by addresses that they are given.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


@intrinsic
def call(typing: Any, address: Any, arguments: Any) -> Any:
    """call(address, (a, b, …)) → its status: of a C function that takes integers, at most six, and returns an int.

    All are passed as 64 bits, each in a register of its own, of which the function reads what it declared.
    """

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.IntType(32), [word] * len(arguments))
        values = [builder.extract_value(given[1], i) for i in range(len(arguments))]
        status = builder.call(builder.inttoptr(given[0], kind.as_pointer()), values)
        return builder.sext(status, word)

    return types.int64(types.int64, types.Tuple([types.int64] * len(arguments))), generate


def compiled(function: Callable[..., Any], signature: str, **how: Any) -> Callable[..., Any]:
    """`function` as native code, from disk if it was compiled before. Else it takes seconds: call it while nobody
    waits. `how`: more of numba's options."""
    try:
        return njit(signature, nogil=True, cache=True, **how)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # there is no folder to keep it in
        return njit(signature, nogil=True, **how)(function)  # type: ignore[no-any-return]


def address_of(function: Any) -> int:
    """Where a function of ctypes begins."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0
