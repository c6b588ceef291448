"""What a user would pick instead: other papers' methods, pruned on our machinery with the same channels and widths."""
