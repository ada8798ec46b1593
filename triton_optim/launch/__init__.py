"""From tensors to Triton: pointer tables, chunks, what is compiled, launchers, tuned sizes.

May use tensors, rules and the kernels.
"""
