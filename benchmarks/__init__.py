"""Benchmarks of train.py against other ways to train the same model; see README.md in this folder."""
