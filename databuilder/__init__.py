"""From text to token files (`build_dataset`), and a corpus that every install has (`docstring_corpus.write_corpus`)."""

from databuilder.dataset_builder import BuildReport, SplitReport, build_dataset
from databuilder.sources import Source

__all__ = ["BuildReport", "Source", "SplitReport", "build_dataset"]
