"""Dense and pruned network run side by side, and every layer is refitted where it stands."""
