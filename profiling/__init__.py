"""NVTX ranges (`profiling.nvtx`) and CUDA memory (`profiling.memory`): both do nothing where there is no CUDA device."""
