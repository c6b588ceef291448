"""The pruners: settings, one step, what it did."""
