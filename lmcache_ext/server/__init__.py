"""The shared cache server: the directory in a process of its own, the pool in memory that all engines of a host map.

Start with `protocol.py` (what is said), `memory.py` and `directory.py` (what there is), `service.py` (what is done when
it is said), `client.py` (the other side). No torch and no CUDA here: engines move their own bytes.
"""
