"""The comparison of methods: as many tried rates for each, the same data, seeds and numbers of parameters."""
