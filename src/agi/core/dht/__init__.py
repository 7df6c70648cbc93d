"""A replicated, self-healing key-value store with no central coordinator."""
