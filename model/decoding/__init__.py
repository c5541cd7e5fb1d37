"""Decoding: the cache of latents, and loops that sample text."""
