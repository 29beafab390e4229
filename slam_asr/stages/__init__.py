"""The stages of a pipeline, one file each.

A stage checks its inputs, computes their digest, has the work done, and writes a record of the result.
"""
