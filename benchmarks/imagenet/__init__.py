"""A published ImageNet network, pruned without fine-tuning: accuracy, and agreement with the dense network."""
