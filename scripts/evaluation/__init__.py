"""The parts of scripts/evaluate.py, quality.py and quickstart.py."""
