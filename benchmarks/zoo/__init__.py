"""Every network of torchvision, and some of timm and transformers, pruned in each preset."""
