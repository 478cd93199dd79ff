"""What doctor shows of settings."""

from __future__ import annotations

from lmcache_ext.cli.settings import check_settings


def test_a_password_in_a_url_is_not_shown() -> None:
    env = {"LMCACHE_REMOTE_URL": "redis://user:secret@cache:6379/0?ttl=60", "LMCACHE_CHUNK_SIZE": "512"}
    (said,) = check_settings(env)
    assert "secret" not in said.text and "remote_url=redis://cache:6379" in said.text and "chunk_size=512" in said.text
