"""Real architectures, small and with random weights: what is adapted, and every promise on each."""
