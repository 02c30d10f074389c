"""Measurements of speed and memory: `run.py` is the command line, docs/performance.md explains the rest."""
