"""One copy of the weights for the workers of several engines: the memory of those that are equal is shared."""
