"""One step: which parameters the kernels take, their state, and what is launched for them.

Knows rules, groups, state and options, and no optimizer class. May use launch and tensors.
"""
