"""What turns gradients into better weights on all processes alike: DeepSpeed, plain DDP, or PyTorch's FSDP2.

`engine` says what the loop may ask of any of them; `zero` is DeepSpeed; `masters` is DDP and FSDP2.
"""
