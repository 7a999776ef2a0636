"""Records become flat JSON lines that every reader can parse."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logger.base import Logger, flatten, to_json_line


class ListLogger(Logger):
    """Keeps its records, and says when it was closed."""

    def __init__(self):
        self.records = []
        self.closed = False

    def write(self, record):
        self.records.append(dict(record))

    def close(self):
        self.closed = True


def test_metrics_are_prefixed_and_flat():
    """Bare names get the prefix `metrics.`, nested mappings are joined with dots, and the step comes first."""
    logger = ListLogger()
    logger.log_metrics(3, {"loss": 2.5, "norm": {"layers.0": 1.0}})
    assert logger.records == [{"step": 3, "metrics.loss": 2.5, "metrics.norm.layers.0": 1.0}]
    assert next(iter(logger.records[0])) == "step"


def test_time_and_memory_are_beside_the_metrics():
    """What was measured of the machine has keys of its own; what is not known is not in the line."""
    logger = ListLogger()
    logger.log_metrics(3, {"loss": 2.5}, elapsed_s=0.5, peak_bytes=7)
    logger.log_metrics(4, {"loss": 2.5}, elapsed_s=0.0)
    assert logger.records[0] == {"step": 3, "metrics.loss": 2.5, "time.elapsed_s": 0.5, "memory.peak_bytes": 7}
    assert logger.records[1] == {"step": 4, "metrics.loss": 2.5, "time.elapsed_s": 0.0}


def test_events_and_records_keep_their_keys():
    """An event starts with its name; a record's keys are kept as given."""
    logger = ListLogger()
    logger.log_event("checkpoint_saved", step=1000)
    logger.log_record({"params.temperature": 0.8, "text": {"prompt": "a"}, "metrics.latency_ms": 1.5})
    assert json.dumps(logger.records[0]) == '{"event": "checkpoint_saved", "step": 1000}'
    assert logger.records[1] == {"params.temperature": 0.8, "text.prompt": "a", "metrics.latency_ms": 1.5}


def test_logger_closes_as_a_context_manager():
    """Leaving the `with` block closes the logger, even after an error."""
    logger = ListLogger()
    with pytest.raises(KeyError), logger:
        raise KeyError("x")
    assert logger.closed
    assert logger.run_id is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
        (torch.tensor([2]), 2),
        (torch.tensor([1.0, 2.0], requires_grad=True), [1.0, 2.0]),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (np.arange(3), [0, 1, 2]),
        ((1, np.int32(2)), [1, 2]),
        (None, None),
        (True, True),
        (float, str(float)),
    ],
)
def test_scalars_become_pythons_own(value, expected):
    """Anything with `.item()` is taken for a scalar; arrays become lists; the rest is written as text."""
    (found,) = flatten({"x": value}).values()
    assert found == expected
    assert type(found) is type(expected)
    assert json.loads(to_json_line({"x": found})) == {"x": expected}


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_non_finite_floats_are_strings(value, text):
    """JSON has no such numbers: they are written as strings, also inside lists."""
    assert json.loads(to_json_line({"x": value, "xs": [value, 1.0]})) == {"x": text, "xs": [text, 1.0]}


@pytest.mark.parametrize(("encoding", "expected"), [("utf-8", '{"x": "é"}\n'), ("ascii", '{"x": "\\u00e9"}\n')])
def test_text_is_readable_where_the_encoding_allows(encoding, expected):
    """Text stays unchanged in UTF-8 and is escaped for a stream that cannot express it."""
    assert to_json_line({"x": "é"}, encoding=encoding) == expected


@given(st.text(alphabet=st.characters(exclude_categories=())), st.sampled_from(["utf-8", "ascii", "latin-1"]))
def test_any_text_is_one_line_that_reads_back(text, encoding):
    """Whatever a model writes (line breaks, half a surrogate pair) is one line, encodable, and the same text again."""
    line = to_json_line({"text.output": text}, encoding=encoding)
    assert line.encode(encoding).count(b"\n") == 1
    # To every JSON reader, two halves of a pair that are side by side are one character.
    joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    assert json.loads(line) == {"text.output": joined if line.isascii() else text}
