"""Lightning modules that the recipes train, and how they are optimized."""
