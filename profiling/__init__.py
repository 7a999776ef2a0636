"""NVTX ranges (`profiling.nvtx`) and CUDA memory (`profiling.memory`); both do nothing on a machine without CUDA."""
