"""Backends: modules that each implement store, gather, compress, decompress, prefill and decode.

The functions take the arguments of the torch.ops.tq4 op of the same name without ``backend`` (``cuda`` takes
``path`` as well), already validated by :mod:`tq4.checks`, and write into the mutable ones.
"""
