"""InfiniStore is refused in so many words."""

from __future__ import annotations

import pytest

from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers import infinistore, open_tier  # noqa: F401 - enters its scheme


@pytest.mark.parametrize("url", ["infinistore://127.0.0.1:12345", "infinistore://host:12345?device=mlx5_0"])
def test_the_scheme_is_refused_with_the_reason(url: str) -> None:
    with pytest.raises(ConfigError, match=r"infinistore://.* not supported: .* server .* RDMA device"):
        open_tier(url)
