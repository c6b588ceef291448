"""Images: where they come from, how they are decoded once and kept, what a data set is, augmentation."""
