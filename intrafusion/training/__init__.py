"""Training: a plain seeded loop that resumes, fine-tuning, and pruning inside a loop of the user's own."""
