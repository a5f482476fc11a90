"""Builders of the models that the recipes adapt, and the small weights shipped for them."""
