"""Adapters from hubs by their addresses: what is fetched, how it is checked, where it is kept."""
