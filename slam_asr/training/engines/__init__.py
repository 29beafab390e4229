"""Training engines: they turn gradients into updated weights, identically on all processes.

`engine` defines the interface that the training loop uses. `deepspeed_engine` implements it with DeepSpeed,
`torch_engine` with PyTorch's DDP and FSDP2. `choose` creates the engine that a recipe names.
"""
