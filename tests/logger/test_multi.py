"""Several loggers as one: no failure of one reaches the others."""

from __future__ import annotations

from logger import JsonlLogger, MultiLogger, NoopLogger, create_logger
from tests.logger.test_base import ListLogger


class Failing(ListLogger):
    """Raises wherever it can."""

    def write(self, record):
        raise OSError("disk full")

    def close(self):
        raise RuntimeError("twice")


def test_a_failing_logger_stops_nobody_and_is_named_once(caplog):
    """The others get every record and are closed; one warning names the failing logger and its reason."""
    first, last = ListLogger(), ListLogger()
    with MultiLogger([first, Failing(), last]) as logger:
        for step in range(3):
            logger.log_metrics(step, {"loss": 1.0})
    assert [len(each.records) for each in (first, last)] == [3, 3]
    assert first.closed
    assert last.closed
    assert [record.getMessage() for record in caplog.records] == ["Failing failed, the run goes on: OSError: disk full"]


def test_recovered_logger_goes_on(tmp_path):
    """A logger that failed is tried again with the next record."""
    logger = ListLogger()
    results = iter([OSError("full"), None])
    keep = logger.write

    def sometimes(record):
        error = next(results)
        if error:
            raise error
        keep(record)

    logger.write = sometimes
    multi = MultiLogger([logger])
    multi.log_event("a")
    multi.log_event("b")
    assert logger.records == [{"event": "b"}]


def test_run_id_is_the_first_that_there_is(tmp_path):
    """The id comes from whichever logger has one."""

    class WithId(ListLogger):
        run_id = "abc"

    assert MultiLogger([JsonlLogger(tmp_path / "m"), WithId()]).run_id == "abc"
    assert MultiLogger([NoopLogger()]).run_id is None
    assert MultiLogger([NoopLogger()], run_id="kept").run_id == "kept"
    assert create_logger("json", run_name="a", run_id="of an earlier start").run_id == "of an earlier start"


def test_artifacts_reach_every_logger():
    """An artifact is offered to each logger, by name and type."""
    seen = []

    class Keeping(ListLogger):
        def log_artifact(self, path, *, name, type):
            seen.append((path, name, type))

    MultiLogger([NoopLogger(), Keeping(), Keeping()]).log_artifact("a", name="b", type="c")
    assert seen == [("a", "b", "c")] * 2
