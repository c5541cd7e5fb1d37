"""Ablations of papers: the framework, and one file per study under the paper's folder."""
