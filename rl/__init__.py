"""Rewards and policies: what R1 adds to training. Empty so far."""
