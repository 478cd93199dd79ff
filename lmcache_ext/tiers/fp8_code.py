"""The loops of fp8.py, compiled without the interpreter's lock and kept on disk. Imports numba: import it late.

Small floats are told by the bits of their mantissa and the bias of their exponent. Rounding, to even, adds just less
than a half to the bits that will be cut off; a number that is denormal in the small float is added to one so large that
its own denormals are the steps. So nothing becomes a denormal float32, which would take a hundred times as long; what
is one as bf16 becomes 0. The types around every step keep numba from widening to 64 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lmcache_ext.native import compiled

_Code = Callable[..., None]


def _compiled(signature: str) -> Callable[[_Code], _Code]:
    return lambda function: compiled(function, signature, error_model="numpy")


def encoder(mantissa: int, bias: int) -> _Code:
    """(numbers, codes, scales) → None: fills the last two."""
    kinds: Any = (np.uint32, np.float32, np.uint16, np.uint8)
    word, real, half, byte = kinds
    infinite, cut, exponents = 0x8000 - (1 << mantissa), 23 - mantissa, (127 - bias) << mantissa
    regular, step = 1 << mantissa, 0.0 if bias == 127 else 2.0 ** (1 - bias - mantissa)

    @_compiled("void(uint16[::1], uint8[::1], float32[::1])")
    def encode(source: Any, codes: Any, scales: Any) -> None:
        for group in range(scales.size):
            numbers, into = source[group * 128 : group * 128 + 128], codes[group * 128 : group * 128 + 128]
            most = half(0)
            for i in range(numbers.size):
                size = half(numbers[i] & half(0x7FFF))
                most = max(most, half(size * half(size < half(infinite))))
            peak = word(word(word(most) + word(exponents)) << word(cut)).view(real)
            peak = peak if most >= regular else real(real(most) * real(step))
            scales[group] = peak / real(448)
            factor = real(448) / peak if peak > real(1e-30) else real(0)  # smaller ones become 0: it would be infinite
            for i in range(numbers.size):
                bits = word(numbers[i])
                size = word(bits & word(0x7FFF))
                value = word(word(size + word(exponents)) << word(cut)).view(real)
                value = value if size >= word(regular) else real(real(size) * real(step))
                value = min(real(value * factor), real(448))
                exact = real(value).view(word)
                code = word(word(exact + word(0x7FFFF) + word(word(exact >> word(20)) & word(1))) >> word(20))
                tiny = word(real(value + real(16384)).view(word) - word(0x46800000))
                code = word(code - word(960)) if value >= real(1 / 64) else tiny
                code = word(0x7F) if size > word(infinite) else code
                into[i] = byte(word(code | word(word(bits >> word(8)) & word(0x80))))

    return encode


def decoder(mantissa: int, bias: int) -> _Code:
    """(codes, scales, numbers) → None: fills the last."""
    kinds: Any = (np.uint32, np.float32, np.uint16)
    word, real, half = kinds
    cut, exponents, least = 23 - mantissa, (127 - bias) << mantissa, 2.0 ** (1 - bias)
    shifted, grid = (1 << (cut - 1)) - 1, 2.0 ** (24 - bias - mantissa)
    grid_bits = int(np.float32(grid).view(np.uint32))

    @_compiled("void(uint8[::1], float32[::1], uint16[::1])")
    def decode(codes: Any, scales: Any, target: Any) -> None:
        for group in range(scales.size):
            given, into = codes[group * 128 : group * 128 + 128], target[group * 128 : group * 128 + 128]
            scale = scales[group]
            for i in range(given.size):
                code = word(given[i])
                size = word(code & word(0x7F))
                value = word(word(size + word(960)) << word(20)).view(real)
                value = real((value if size >= word(8) else real(real(size) * real(1 / 512))) * scale)
                exact = real(value).view(word)
                bits = word(word(exact + word(shifted) + word(word(exact >> word(cut)) & word(1))) >> word(cut))
                tiny = word(real(value + real(grid)).view(word) - word(grid_bits))
                bits = word(bits - word(exponents)) if value >= real(least) else tiny
                bits = bits if size != word(0x7F) else word(0x7FFF)
                into[i] = half(word(bits | word(word(code & word(0x80)) << word(8))))

    return decode
