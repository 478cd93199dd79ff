"""For MkDocs: links to files outside docs/ become their names, because the site does not have those files."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`[figures](../benchmarks/x.md)` → figures (`benchmarks/x.md`)."""
    return _OUTSIDE.sub(lambda match: match[1] if match[2] in match[1] else f"{match[1]} (`{match[2]}`)", markdown)
