"""Random small networks, pruned in every preset: `python -m tests.sweep --count 500 --from 0`."""
