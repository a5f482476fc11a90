"""Low-rank compression of a whole network: layers by smaller plain ones, ranks chosen over all of them."""
