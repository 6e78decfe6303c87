"""Plans for systems one does not have: what fits, how long it takes and what limits it."""
