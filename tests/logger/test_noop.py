"""The logger that keeps nothing."""

from __future__ import annotations

from logger import NoopLogger


def test_nothing_is_written_or_waited_for(capsys):
    """There is no output, and a scalar on a device is not even fetched."""

    class Device:
        def item(self):
            raise AssertionError("fetched")

    with NoopLogger() as logger:
        logger.log_metrics(1, {"loss": Device()})
        logger.log_event("started")
        logger.log_record({"text.output": "a"})
        logger.log_artifact("nowhere", name="a", type="b")
    assert logger.run_id is None
    assert capsys.readouterr() == ("", "")
