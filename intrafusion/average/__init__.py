"""Several networks of one architecture become one: aligned channel by channel, averaged, refitted."""
