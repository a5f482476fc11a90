"""What can be told to a Trainer's loggers beside numbers, one file a kind of logger."""
