"""What stands around a step: clipping, CUDA graphs, stepping in the backward pass.

May use the base class and all below it, and no single optimizer.
"""
