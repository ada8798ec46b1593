"""Where the elements of a tensor lie: memory layouts, and the local shards of DTensors.

Uses torch alone.
"""
