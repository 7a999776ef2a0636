"""The best model that a text and a time can give: which settings, how good it will be, and how good that guess was.

Begin with `choice.py`: the rules by which a text, a machine and a time become the settings of a run.
"""
