"""The data plane: moves bytes between the engine's paged KV memory and the host pool. It decides nothing."""

from lmcache_ext.transfer.base import Plan, Result, Transfer
from lmcache_ext.transfer.pages import PageTable
from lmcache_ext.transfer.pool import Growth, HostPool, Pool

__all__ = ["Growth", "HostPool", "PageTable", "Plan", "Pool", "Result", "Transfer", "open_transfer"]


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
