"""An hour of random faults on a cluster: `make soak MINUTES=60`. `__main__.py` is the loop."""
