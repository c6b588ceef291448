"""What pruning costs, beside torch-pruning and in forward passes of the dense network."""
