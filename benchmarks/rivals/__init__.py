"""What a user would pick instead, on the same checkpoint, channels, images and size: `python -m benchmarks.rivals`."""
