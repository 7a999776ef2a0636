"""Event files, read back with TensorBoard's own reader."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from logger import TensorboardLogger, create_logger, require_backends
from logger.base import Logger
from tests.small_disk import files_of_at_most

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs the extra tensorboard")
ROOT = Path(__file__).parents[2]


def read(directory: Path) -> Any:
    """Return what TensorBoard has of a directory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory))
    found.Reload()
    return found


def scalars(directory: Path, key: str) -> list[tuple[int, float]]:
    """Return the points of a scalar."""
    return [(point.step, point.value) for point in read(directory).Scalars(key)]


def texts(directory: Path, tag: str) -> list[tuple[int, str]]:
    """Return the texts under a tag, without the four spaces that make each line a line of code."""
    found = [(text.step, text.tensor_proto.string_val[0].decode()) for text in read(directory).Tensors(tag)]
    lines = [(step, text.split("\n")) for step, text in found]
    assert all(line.startswith("    ") for _, text in lines for line in text)
    return [(step, "\n".join(line[4:] for line in text)) for step, text in lines]


def train(logger: Logger, start: int, end: int, *, loss: float = 1.0) -> None:
    """Log a start of a run and its steps."""
    logger.log_event("started", step=start)
    for step in range(start + 1, end + 1):
        logger.log_metrics(step, {"loss": loss / step, "lr": 0.5}, elapsed_s=2.0 * step)


def test_numbers_are_scalars_under_their_keys(tmp_path: Path) -> None:
    """Each number of a step line is a point at its step, those that are not finite too; nothing else is one."""
    with TensorboardLogger(tmp_path) as logger:
        train(logger, 0, 4)
        logger.log_metrics(5, {"loss": math.nan, "lr": math.inf, "tokens": 10**12, "words": "a", "yes": True})
    assert set(read(tmp_path).Tags()["scalars"]) == {"metrics.loss", "metrics.lr", "metrics.tokens", "time.elapsed_s"}
    points = scalars(tmp_path, "metrics.loss")
    assert points[:4] == [(step, pytest.approx(1 / step)) for step in range(1, 5)]
    assert math.isnan(points[4][1])
    assert scalars(tmp_path, "metrics.lr")[4] == (5, math.inf)
    assert scalars(tmp_path, "metrics.tokens") == [(5, pytest.approx(1e12))]
    assert scalars(tmp_path, "time.elapsed_s")[-1] == (4, 8.0)


def test_samples_events_and_settings_are_texts(tmp_path: Path) -> None:
    """Each prompt has a tag of its own; signs of Markdown, line ends and broken characters are kept as text."""
    with TensorboardLogger(tmp_path, config={"model": {"d_model": 8}}) as logger:
        logger.log_event("started", step=0, parameters=12)
        for step in (2, 4):
            for prompt in ("", "One"):
                logger.log_record(
                    {"event": "sample", "step": step, "text.prompt": prompt, "text.output": f"# {step}\n\n*"}
                )
        logger.log_record({"event": "sample", "step": 6, "text.prompt": "", "text.output": "\ud800"})
    assert texts(tmp_path, "sample/1") == [(2, "# 2\n\n*"), (4, "# 4\n\n*"), (6, "?")]
    assert texts(tmp_path, "sample/2") == [(2, "One# 2\n\n*"), (4, "One# 4\n\n*")]
    assert json.loads(texts(tmp_path, "config")[0][1]) == {"model": {"d_model": 8}}
    assert json.loads(texts(tmp_path, "event/started")[0][1]) == {"step": 0, "parameters": 12}


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    """After a kill at step 7 and a start at 5, the later steps are those of the second start, and none is doubled."""
    with TensorboardLogger(tmp_path) as logger:
        train(logger, 0, 7)
    with TensorboardLogger(tmp_path) as logger:
        train(logger, 5, 6, loss=100.0)
    points = scalars(tmp_path, "metrics.loss")
    assert [step for step, _ in points] == [1, 2, 3, 4, 5, 6]
    assert points[-1][1] == pytest.approx(100 / 6)
    assert [path.name[-6:] for path in sorted(tmp_path.iterdir())] == ["000001", "000002"]


def test_a_rolled_back_run_has_each_step_once(tmp_path: Path) -> None:
    """Steps that were taken back in the same start are forgotten, too."""
    with TensorboardLogger(tmp_path) as logger:
        train(logger, 0, 7)
        logger.log_event("rolled_back", step=3, from_step=8)
        logger.log_metrics(4, {"loss": 100.0})
    assert [step for step, _ in scalars(tmp_path, "metrics.loss")] == [1, 2, 3, 4]


def test_a_torn_file_costs_its_last_record(tmp_path: Path) -> None:
    """A kill in the middle of a write hides nothing of what was before or of the next start."""
    with TensorboardLogger(tmp_path) as logger:
        train(logger, 0, 3)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    with TensorboardLogger(tmp_path) as logger:
        train(logger, 2, 4)
    assert [step for step, _ in scalars(tmp_path, "metrics.loss")] == [1, 2, 3, 4]


@pytest.mark.skipif(sys.platform == "win32", reason="sets a limit on file sizes")
def test_a_full_disk_costs_its_records_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run is told once and goes on; what comes when there is room again is read, and so is what was before."""
    with create_logger("tensorboard", run_name="a", jsonl_path=tmp_path / "metrics.jsonl") as logger:
        train(logger, 0, 2)
        (path,) = (tmp_path / "tensorboard").iterdir()
        with files_of_at_most(path.stat().st_size + 20):
            for step in (3, 4):
                logger.log_metrics(step, {"loss": 1.0})
        logger.log_metrics(5, {"loss": 1.0})
    assert [step for step, _ in scalars(tmp_path / "tensorboard", "metrics.loss")] == [1, 2, 5]
    told = [line.getMessage() for line in caplog.records]
    assert sum("TensorboardLogger failed, the run goes on" in line for line in told) == 1


def test_several_backends_get_every_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """stdout, the file and TensorBoard have the same steps."""
    with create_logger(["json", "tensorboard"], run_name="a", jsonl_path=tmp_path / "m.jsonl") as logger:
        train(logger, 0, 3)
    assert capsys.readouterr().out == (tmp_path / "m.jsonl").read_text()
    assert len(scalars(tmp_path / "tensorboard", "metrics.loss")) == 3


def test_without_a_run_directory_there_is_no_place(tmp_path: Path) -> None:
    """The error names the key and what is missing."""
    with pytest.raises(ValueError, match=r'logging\.backend: "tensorboard" needs jsonl_path'):
        create_logger("tensorboard", run_name="a")


@pytest.mark.parametrize("spec", [None, ModuleSpec("tensorboard", None)], ids=["missing", "a folder of that name"])
def test_a_missing_package_is_one_line(
    spec: ModuleSpec | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what to type, and no file is made; the folder of the events of a run is no package."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    said = r'tensorboard is not installed: in the clone, pip install -e ".\[tensorboard\]"'
    with pytest.raises(ValueError, match=said):
        create_logger(["console", "tensorboard"], run_name="a", jsonl_path=tmp_path / "run/m.jsonl")
    assert not (tmp_path / "run").exists()


def test_a_package_that_cannot_be_imported_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A protobuf that does not fit raises its own error on import; ours names the package and that error."""
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(ValueError, match=r"tensorboard cannot be imported: ModuleNotFoundError: .*proto"):
        require_backends(["tensorboard"])


def test_writing_needs_neither_torch_nor_tensorflow(tmp_path: Path) -> None:
    """They take seconds to import, and TensorFlow would take a GPU's memory."""
    program = (
        "import sys; from logger import TensorboardLogger; logger = TensorboardLogger(sys.argv[1])\n"
        "logger.log_event('started', step=0); logger.log_metrics(1, {'loss': 1.0}); logger.close()\n"
        "print([name for name in ('torch', 'tensorflow', 'grpc') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
