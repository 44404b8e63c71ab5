"""Tensor and sequence parallelism: weights cut over tp ranks, and the collectives between them."""
