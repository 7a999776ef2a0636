"""NVTX ranges (`profiling.nvtx`) and memory (`profiling.memory`); without CUDA, only a process's memory is counted."""
