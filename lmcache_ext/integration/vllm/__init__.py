"""The vLLM connector. Importing this module is cheap: no CUDA, no threads (vLLM imports it in every process)."""

if __name__ == "vllm":
    # Python was started in the folder above, which it puts on sys.path, and somebody wants the real vLLM.
    import importlib
    import sys
    from pathlib import Path

    _here = Path(__file__).resolve().parents[1]
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _here]
    del sys.modules[__name__]
    importlib.import_module(__name__)
else:
    from lmcache_ext.integration.vllm.connector import (
        LMCacheConnectorV1,
        LMCacheConnectorV1Dynamic,
        LMCacheMPConnector,
    )
    from lmcache_ext.integration.vllm.impl import LMCacheConnectorV1Impl

    __all__ = ["LMCacheConnectorV1", "LMCacheConnectorV1Dynamic", "LMCacheConnectorV1Impl", "LMCacheMPConnector"]
