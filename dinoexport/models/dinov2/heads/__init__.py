"""Heads turn DINOv2's tokens into results: the released heads, Depth Anything V2, and a user's fitted classifiers.

`kinds` lists the heads with their inputs and outputs. `reference` holds the plain PyTorch formulas that results are
compared with; `graph` and `fold` hold what is traced; `model` joins a backbone and a head in one graph.
"""
