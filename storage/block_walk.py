"""The former name of `storage.kernels.use_compiled_kernels`."""

from storage.kernels import use_compiled_kernels as use_compiled_walk

__all__ = ["use_compiled_walk"]
