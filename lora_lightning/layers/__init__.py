"""Adapted layers, one file a family, and what a thread sees of them; not which layers are adapted."""
