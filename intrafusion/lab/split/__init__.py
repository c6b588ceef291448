"""Networks trained on parts of the images, pruned and fused into one: the recipe's section ``split``."""
