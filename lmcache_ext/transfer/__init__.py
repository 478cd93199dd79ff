"""The data plane: moves bytes between the engine's paged KV memory and a pool. It decides nothing."""

from lmcache_ext.transfer.base import Plan, Result, Transfer
from lmcache_ext.transfer.pages import PageTable
from lmcache_ext.transfer.pool import GpuPool, Growth, HostPool, Pool, Shape

__all__ = [
    "GpuPool",
    "Growth",
    "HostPool",
    "PageTable",
    "Plan",
    "Pool",
    "Result",
    "Shape",
    "Transfer",
    "gpu_pool",
    "open_transfer",
]


def gpu_pool(shape: Shape, name: str, device: int) -> GpuPool:
    """Slots in a GPU's memory, whose context the calling thread has.

    Raises:
        TransferError: there is not so much memory left.
    """
    from lmcache_ext.transfer.cuda import compile_sums
    from lmcache_ext.transfer.driver import Driver

    compile_sums(device)
    return GpuPool(shape, name, Driver().allocate(shape.nbytes), device)


def open_transfer(pages: PageTable, pool: Pool, load_timeout: float) -> Transfer:
    """The data plane for the device that holds `pages`.

    Raises:
        LayoutError: no data plane for that device.
    """
    from lmcache_ext.errors import LayoutError

    if pages.device == "cpu":
        from lmcache_ext.transfer.cpu import CpuTransfer

        return CpuTransfer(pages, pool, load_timeout)
    if pages.device == "cuda":
        from lmcache_ext.transfer.cuda import CudaTransfer

        return CudaTransfer(pages, pool, load_timeout)
    raise LayoutError(f"KV cache lies on {pages.device!r}; cpu and cuda are what we can copy from")
