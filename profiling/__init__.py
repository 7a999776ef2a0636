"""NVTX ranges (`profiling.nvtx`) and CUDA memory (`profiling.memory`); without CUDA both do nothing."""
