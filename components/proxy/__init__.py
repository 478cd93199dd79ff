"""An OpenAI-compatible proxy over prefillers and decoders that are plain ``vllm serve``: docs/proxy.md."""
