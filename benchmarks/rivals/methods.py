"""Every method of the comparison by name, each pruning a copy of the same network to the same widths."""
