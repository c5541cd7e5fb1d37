"""Verdicts of studies: comparisons of arms, their power, and the code that they depend on."""
