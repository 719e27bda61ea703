"""The parts of scripts/benchmark.py: settings, inputs, correctness checks, timing and tables."""
