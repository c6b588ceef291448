"""Language models pruned without fine-tuning, beside every rival, on two texts."""
