"""Training of a causal LM: settings, data, schedule, checkpoints, metrics, and the loop."""
