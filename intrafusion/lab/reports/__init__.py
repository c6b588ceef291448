"""From the results of a run or a sweep to what a person reads."""
