"""How much of dense attention's quality a sparse setting keeps, on a model that is tuned for it."""
