"""The stages of the pipelines and the other commands, one file each.

A stage checks its inputs, computes their digest, calls the functions that do the work, and writes a record.
"""
