"""The few calls of the CUDA driver that torch does not offer, or not from every thread."""

from __future__ import annotations

import ctypes

from lmcache_ext.errors import TransferError

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE


class Driver:
    """The CUDA context of the thread that makes it, for other threads to work in.

    Raises:
        TransferError: there is no driver, or this thread has no context.
    """

    def __init__(self) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise TransferError(f"no CUDA driver: {error}") from None
        self._context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(self._context))
        if not self._context:
            raise TransferError("cuCtxGetCurrent: this thread has no CUDA context")

    def enter(self) -> None:
        """Let the calling thread use the context, also while the engine captures a graph in another thread: in CUDA's
        default mode a call that allocates or asks, made by any thread, would spoil that capture."""
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(ctypes.c_int(_RELAXED)))

    def pin(self, address: int, nbytes: int) -> None:
        """Page-lock host memory for the GPU."""
        self._call(
            "cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_uint(_PORTABLE)
        )

    def unpin(self, address: int) -> None:
        """Undo `pin`; `address` as it was given there."""
        self._call("cuMemHostUnregister", ctypes.c_void_p(address))

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._cuda, name)(*arguments)  # without the GIL
        if status:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorName(status, ctypes.byref(text))
            raise TransferError(f"{name} failed with {(text.value or b'?').decode()}")
