"""From text to token files (`build_dataset`), and a corpus that every install has (`docstring_corpus.write_corpus`)."""

from databuilder.dataset_builder import BuildReport, SplitReport, build_dataset

__all__ = ["BuildReport", "SplitReport", "build_dataset"]
