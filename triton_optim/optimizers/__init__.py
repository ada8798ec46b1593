"""What a user constructs: one file an optimizer, with its signature, docstring and rule.

May use all below: the base class, rules, and what a row-wise optimizer needs of tensors.
"""
