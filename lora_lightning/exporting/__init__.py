"""Models as files that other programs run: formats, their check, and what lies beside them."""
