"""The parts of `experiments/table3.py`."""
