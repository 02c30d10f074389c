"""What can go wrong during a run, as opposed to in its settings."""


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says what happened, what is safe and what to do."""


class NonFiniteError(TrainingError):
    """A loss or gradient was infinite or not a number; the update was refused and the run stopped."""


class CheckpointError(TrainingError):
    """A checkpoint could not be written, or none could be read."""
