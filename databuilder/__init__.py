"""From text to token files (`build_dataset`), and a corpus that every install has (`write_corpus`)."""

from databuilder.dataset_builder import BuildReport, SplitReport, build_dataset
from databuilder.docstring_corpus import collect_docstrings, write_corpus

__all__ = ["BuildReport", "SplitReport", "build_dataset", "collect_docstrings", "write_corpus"]
