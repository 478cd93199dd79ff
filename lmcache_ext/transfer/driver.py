"""The calls of the CUDA driver that we make without torch: from threads of our own, and from compiled code.

All handles and addresses are 64-bit integers here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from lmcache_ext.errors import TransferError
from lmcache_ext.native import address_of

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE
_BLOCKING_SYNC, _DISABLE_TIMING = 1, 2  # CU_EVENT_*
_NOT_READY = 600

_I, _U = ctypes.c_int64, ctypes.c_uint32


class KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2: a kernel, its shape, and where the addresses of its arguments lie."""

    _fields_ = (
        ("function", _I), ("grid", _U * 3), ("block", _U * 3), ("shared", _U), ("arguments", _I), ("extra", _I),
        ("kernel", _I), ("context", _I),
    )  # fmt: skip


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

    def addresses(self, calls: Sequence[str]) -> list[int]:
        """Where these functions of the driver begin, for compiled code. None of them holds the GIL."""
        return [address_of(getattr(self._cuda, name)) for name in calls]

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

    def allocate(self, nbytes: int) -> int:
        """Address of so much of the GPU's memory, apart from torch's: other processes can be let write into it."""
        address = ctypes.c_uint64()
        self._check("cuMemAlloc", self._cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(nbytes)))
        return address.value

    def new_event(self, timed: bool = False) -> int:
        """An event; whoever waits for it on the host sleeps."""
        event = ctypes.c_uint64()
        flags = _BLOCKING_SYNC | (0 if timed else _DISABLE_TIMING)
        self._check("cuEventCreate", self._cuda.cuEventCreate(ctypes.byref(event), flags))
        return event.value

    def new_graph(self, kernel: KernelNode) -> tuple[int, int]:
        """(a graph of this kernel alone, ready to be launched; its node)."""
        graph, node, ready = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_uint64()
        self._check("cuGraphCreate", self._cuda.cuGraphCreate(ctypes.byref(graph), 0))
        add = self._cuda.cuGraphAddKernelNode_v2
        status = add(ctypes.byref(node), graph, None, ctypes.c_size_t(0), ctypes.byref(kernel))
        self._check("cuGraphAddKernelNode", status)
        status = self._cuda.cuGraphInstantiateWithFlags(ctypes.byref(ready), graph, ctypes.c_uint64(0))
        self._check("cuGraphInstantiate", status)
        return ready.value, node.value

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
        wait = self._cuda.cuStreamWaitEvent
        self._check("cuStreamWaitEvent", wait(ctypes.c_uint64(stream), ctypes.c_uint64(event), 0))

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
