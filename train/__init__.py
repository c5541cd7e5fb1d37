"""Tokens and steps. So far: meshes, and what is spread over them."""
