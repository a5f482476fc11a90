"""What to adapt: a model's structure and a configuration made a plan; nothing here changes a model."""
