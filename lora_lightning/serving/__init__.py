"""Serving over HTTP: one base, adapters by name, requests of several in one batch."""
