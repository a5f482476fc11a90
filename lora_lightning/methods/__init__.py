"""The low-rank methods, one file a family: how updates begin, ranks, terms of the loss, optimizers."""
