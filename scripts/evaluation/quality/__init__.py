"""The parts of scripts/quality.py: how much of dense attention's quality a sparse setting keeps."""
