"""Ablations of papers: the framework, and one module per study in the folder of its paper."""
