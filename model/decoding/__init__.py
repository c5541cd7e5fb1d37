"""Decoding: the key-value cache, and the loops that sample text."""
