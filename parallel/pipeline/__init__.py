"""Pipeline parallelism: layers in stages on different ranks.

`pipeline` loads torch.distributed.pipelining, which is slow; `stages` does not.
"""
