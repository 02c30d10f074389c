"""The parts of `experiments/compare_pytorch.py`."""
