"""The files of a tiny run, as the tests of training have them."""

from tests.training.conftest import files  # noqa: F401 (a fixture)
