"""Runs of studies that train on text, and what is measured of them."""
