"""Networks: the only room that touches the insides of torch-pruning."""
