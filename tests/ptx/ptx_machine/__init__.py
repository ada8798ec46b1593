"""Runs the PTX that Triton compiles, without a GPU: see tests/ptx/README.md."""
