"""Lightning data modules that the recipes train on, one file a data set."""
