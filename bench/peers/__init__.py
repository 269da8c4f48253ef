"""pipo against its peers: the same weights, the same memory limit, taking turns in one run. `python -m bench.peers`."""
