"""What the training application is made of: the check of a command line, the jobs, their loggers."""
