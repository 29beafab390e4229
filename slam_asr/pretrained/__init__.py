"""Pretrained models: finding, downloading, converting and loading them."""
