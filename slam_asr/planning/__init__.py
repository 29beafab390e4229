"""What a recipe will cost, before a GPU is paid for: memory, time and storage, from configurations alone."""
