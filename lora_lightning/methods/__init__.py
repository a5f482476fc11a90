"""The low-rank methods, one file a family: how updates begin, their ranks, what is added to the loss, optimizers."""
