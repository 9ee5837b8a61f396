"""Choosing what to run by what it costs and what it brings."""
