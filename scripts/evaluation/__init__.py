"""What a model has learned: bits per token by position, as tables and plots."""
