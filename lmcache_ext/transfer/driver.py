"""The calls of the CUDA driver that we make without torch: from threads of our own, and from compiled code.

All handles and addresses are 64-bit integers here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from lmcache_ext.errors import TransferError

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE
_BLOCKING_SYNC, _DISABLE_TIMING = 1, 2  # CU_EVENT_*
_NOT_READY = 600

Call = Callable[..., int]
_I, _U = ctypes.c_int64, ctypes.c_uint32


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
        self._check("cuCtxGetCurrent", self._cuda.cuCtxGetCurrent(ctypes.byref(self._context)))
        if not self._context:
            raise TransferError("cuCtxGetCurrent: this thread has no CUDA context")
        self.wait_event = self._function("cuStreamWaitEvent", _I, _I, _U)  # stream, event, flags
        self.record = self._function("cuEventRecord", _I, _I)  # event, stream
        self.await_event = self._function("cuEventSynchronize", _I)
        self.copy_in = self._function("cuMemcpyHtoDAsync_v2", _I, _I, _I, _I)  # device, host, bytes, stream
        self.copy_out = self._function("cuMemcpyDtoHAsync_v2", _I, _I, _I, _I)  # host, device, bytes, stream
        # function, grid x y z, block x y z, bytes of shared memory, stream, arguments, extra
        self.launch = self._function("cuLaunchKernel", _I, _U, _U, _U, _U, _U, _U, _U, _I, _I, _I)

    def enter(self) -> None:
        """Let the calling thread use the context, also while the engine captures a graph in another thread: in CUDA's
        default mode a call that allocates or asks, made by any thread, would spoil that capture."""
        self._check("cuCtxSetCurrent", self._cuda.cuCtxSetCurrent(self._context))
        mode = ctypes.byref(ctypes.c_int(_RELAXED))
        self._check("cuThreadExchangeStreamCaptureMode", self._cuda.cuThreadExchangeStreamCaptureMode(mode))

    def pin(self, address: int, nbytes: int) -> None:
        """Page-lock host memory for the GPU."""
        status = self._cuda.cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _PORTABLE)
        self._check("cuMemHostRegister", status)

    def unpin(self, address: int) -> None:
        """Undo `pin`; `address` as it was given there."""
        self._check("cuMemHostUnregister", self._cuda.cuMemHostUnregister(ctypes.c_void_p(address)))

    def new_event(self, timed: bool = False) -> int:
        """An event; whoever waits for it on the host sleeps."""
        event = ctypes.c_uint64()
        flags = _BLOCKING_SYNC | (0 if timed else _DISABLE_TIMING)
        self._check("cuEventCreate", self._cuda.cuEventCreate(ctypes.byref(event), flags))
        return event.value

    def reached(self, event: int) -> bool:
        """Whether the work before the event's last record is over. Raises TransferError if it failed."""
        status = self._cuda.cuEventQuery(ctypes.c_uint64(event))
        if status != _NOT_READY:
            self._check("cuEventQuery", status)
        return bool(status == 0)

    def seconds(self, began: int, ended: int) -> float:
        """Between two timed events that were reached."""
        taken = ctypes.c_float()
        elapsed = getattr(self._cuda, "cuEventElapsedTime_v2", None) or self._cuda.cuEventElapsedTime
        self._check("cuEventElapsedTime", elapsed(ctypes.byref(taken), ctypes.c_uint64(began), ctypes.c_uint64(ended)))
        return taken.value / 1e3

    def order(self, stream: int, event: int) -> None:
        """What comes on `stream` waits for `event`."""
        self._check("cuStreamWaitEvent", self.wait_event(stream, event, 0))

    def finish(self, stream: int) -> None:
        """Wait for all that was issued on `stream`."""
        self._check("cuStreamSynchronize", self._cuda.cuStreamSynchronize(ctypes.c_uint64(stream)))

    def error(self, call: str, status: int) -> TransferError:
        """What to raise for a status."""
        text = ctypes.c_char_p()
        self._cuda.cuGetErrorName(status, ctypes.byref(text))
        return TransferError(f"{call} failed with {(text.value or b'?').decode()}")

    def _check(self, call: str, status: int) -> None:
        if status:
            raise self.error(call, status)

    def _function(self, name: str, *arguments: type) -> Call:
        """With declared types, so that compiled code can call it, too. None of them holds the GIL."""
        function = getattr(self._cuda, name)
        function.argtypes, function.restype = list(arguments), ctypes.c_int
        return function  # type: ignore[no-any-return]
