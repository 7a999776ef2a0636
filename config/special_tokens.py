"""The special token that separates documents unless a file or a run names another one."""

from __future__ import annotations

END_OF_TEXT = "<|endoftext|>"
