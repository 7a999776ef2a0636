"""Event files for TensorBoard, written by TensorBoard's own code, which needs neither TensorFlow nor torch.

A number of a step line is a scalar under its key (`metrics.loss`). Samples, events and the configuration are texts.
Each start of a run writes a file of its own. A session mark in it tells TensorBoard to forget later steps, which are
about to be made again.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config.extras import require_extra
from logger.base import Logger
from logger.file_logger import append_whole

_PREFIX = "events.out.tfevents."


class TensorboardLogger(Logger):
    """Writes records to a new event file in `directory`, each at once.

    `config` is shown as a text. A record that a full disk did not take is lost here, and the file stays readable.
    Raises ValueError if the package is missing or cannot be imported, and OSError if the file cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str], *, config: Mapping[str, Any] | None = None) -> None:
        require_tensorboard()
        self._config = dict(config or {})
        self._prompts: dict[str, int] = {}
        self._file = _new_file(Path(directory))
        self._write(file_version="brain.Event:2")

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record; a step line is one event with a scalar for each of its numbers."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        step, event = record.get("step"), record.get("event")
        step = step if isinstance(step, int) else 0
        if event in ("started", "rolled_back"):
            self._begin_session(step)
        texts, scalars = self._texts_of(record) if event else {}, {} if event else _scalars_of(record)
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        values += [_text_value(tag, text) for tag, text in texts.items()]
        if values:
            self._write(step=step, summary=Summary(value=values))

    def sync(self) -> None:
        """Flush the file to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _begin_session(self, step: int) -> None:
        """Let TensorBoard forget what it has of later steps than `step`, and of this one what now comes again."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def _texts_of(self, record: Mapping[str, Any]) -> dict[str, str]:
        """Return the texts of an event by their tags: each prompt of a run's samples has its own tag."""
        if record["event"] == "sample":
            prompt = str(record.get("text.prompt", ""))
            number = self._prompts.setdefault(prompt, len(self._prompts) + 1)
            return {f"sample/{number}": prompt + str(record.get("text.output", ""))}
        texts = {f"event/{record['event']}": _as_json({key: value for key, value in record.items() if key != "event"})}
        if record["event"] == "started" and self._config:
            texts["config"] = _as_json(self._config)
        return texts

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        RecordWriter(buffer).write(Event(wall_time=time.time(), **fields).SerializeToString())
        append_whole(self._file, buffer.getvalue())


def require_tensorboard() -> None:
    """Raise ValueError if the package tensorboard is not installed, or cannot be imported as it is installed."""
    require_extra("tensorboard")
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # noqa: F401
        from tensorboard.summary.writer import record_writer  # noqa: F401
    except Exception as error:  # protobuf of another version raises TypeError
        raise ValueError(f"tensorboard cannot be imported: {type(error).__name__}: {error}") from None


def _new_file(directory: Path) -> io.FileIO:
    """Open the next event file of a directory; TensorBoard reads them in the order of their names."""
    directory.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.name.removeprefix(_PREFIX)) for path in directory.glob(f"{_PREFIX}{'[0-9]' * 6}")]
    number = max(numbers, default=0) + 1
    return io.FileIO(directory / f"{_PREFIX}{number:06d}", "ab")


def _scalars_of(record: Mapping[str, Any]) -> dict[str, float]:
    numbers = {key: value for key, value in record.items() if key != "step" and not isinstance(value, bool)}
    return {key: float(value) for key, value in numbers.items() if isinstance(value, int | float)}


def _as_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False, default=str)


def _text_value(tag: str, text: str) -> Any:
    """Return a text, which TensorBoard shows as Markdown, as a block of code: its lines and signs stay as they are."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    block = "\n".join(f"    {line}" for line in text.split("\n"))
    plugin = SummaryMetadata.PluginData(plugin_name="text")
    return Summary.Value(
        tag=tag,
        metadata=SummaryMetadata(plugin_data=plugin),
        tensor=TensorProto(
            dtype="DT_STRING",
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
            string_val=[block.encode("utf-8", "replace")],
        ),
    )
