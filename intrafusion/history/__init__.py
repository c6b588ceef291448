"""What became of every parameter, so that optimizers, averages and later processes can follow."""
