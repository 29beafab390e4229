"""The machine and its processes: worker processes, the division of work, large sorts."""
