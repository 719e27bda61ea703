"""What scripts/benchmark.py is made of: settings, inputs, judges, clocks and tables."""
