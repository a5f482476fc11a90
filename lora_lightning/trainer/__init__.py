"""The Lightning side: the callback, checkpoints, strategies, exact resume; no tasks, data or models."""
