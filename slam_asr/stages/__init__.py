"""The stages, one file each: check inputs, compute their digest, call the trades, write the record."""
