"""The Dynamo worker that carries our KV cache: vLLM behind a Dynamo endpoint.

Run it with ``python -m dynamo_lmcache.vllm``. One module per concern:

=================  =========================================================
``settings``       environment defaults: discovery, planes, loopback
``flags``          Dynamo's flags: which are supported, which refused and why
``transfer``       role and ENABLE_LMCACHE to ``--kv-transfer-config``
``lmcache_env``    LMCACHE_* defaults for keys that nothing else names
``args``           the command line to one frozen ``WorkerConfig``
``sampling``       Dynamo's request dict to vLLM's ``SamplingParams``
``outputs``        vLLM's outputs to Dynamo's response chunks
``errors``         engine errors to HTTP statuses
``handlers``       the request handlers: aggregated, prefill, decode
``lora``           load, unload and list adapters
``publisher``      KV events, load metrics, Prometheus
``registration``   the model card
``health``         probe payload, engine watchdog, the way out when it dies
``shutdown``       SIGTERM: leave discovery, drain, stop
``warmup``         pay for lazy compilation before the first user does
``nixl``           vLLM plugin: let NIXL's progress thread sleep
``worker``         the running worker
``main``           the entry point
=================  =========================================================

This package must stay cheap to import: the frontend imports ``settings``.
"""
