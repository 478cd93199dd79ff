"""A KV-cache layer for LLM serving: prefill once, reuse everywhere."""

__version__ = "0.1.0"
