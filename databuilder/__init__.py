"""From text to token files (`build_dataset`), and text that needs no download.

That text is stories from a grammar (`stories.write_corpus`) and docstrings (`docstring_corpus.write_corpus`).
"""

from databuilder.dataset_builder import BuildReport, SplitReport, build_dataset
from databuilder.sources import Source

__all__ = ["BuildReport", "Source", "SplitReport", "build_dataset"]
