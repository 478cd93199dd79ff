"""``python -m dynamo_lmcache.vllm``."""

from dynamo_lmcache.vllm.main import main

# vLLM spawns its engine processes, and spawn imports this module again.
if __name__ == "__main__":
    main()
