"""Which channels belong together, what each layer has of them, and mixing them."""
