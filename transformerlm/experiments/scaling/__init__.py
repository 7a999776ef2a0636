"""Scaling laws: how low the loss of a model of N parameters gets on D tokens, from runs that are small enough to make.

Begin with `law.py`: the law, and what a fit minimises, in a few lines.
"""
