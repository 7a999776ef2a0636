"""Parts are done once, by any number of processes, and what is left of killed ones goes."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

from config.schemas import ClusterConfig
from transformerlm.distributed import share_work, work
from transformerlm.distributed.parts_folder import PartsFolder
from transformerlm.distributed.share_work import own_share
from transformerlm.distributed.work import Part, do_part, read_facts

LOCAL = ClusterConfig()


def write_square(folder: Path, *, number: int, log: str) -> dict[str, int]:
    """Write a number's square, and a line in a log that says who did it."""
    (folder / "square.txt").write_text(str(number**2))
    with open(log, "a") as file:
        file.write(f"{number}\n")
    return {"square": number**2}


def refuse(folder: Path) -> dict[str, int]:
    """Leave a file half written, as a part does that meets a bad line."""
    (folder / "half.txt").write_text("ha")
    raise ValueError("text.jsonl:3: expected JSON")


def squares(tmp_path: Path, count: int = 5) -> list[Part]:
    return [
        Part(f"p{number}", write_square, {"number": number, "log": str(tmp_path / "log")}) for number in range(count)
    ]


def done_in(tmp_path: Path) -> list[int]:
    return [int(line) for line in (tmp_path / "log").read_text().split()]


def parts_folder(tmp_path: Path, *, settings: object = 1, cluster: ClusterConfig = LOCAL, **others) -> PartsFolder:
    return PartsFolder(
        tmp_path / "out.parts", {"value": settings}, list_items=lambda: ["a", "b"], cluster=cluster, **others
    )


def test_parts_are_done_once_and_their_facts_are_kept(tmp_path):
    """A second call does nothing again and returns the same facts, in the order of the parts; so does a third, anew."""
    seen: list[tuple[str, bool]] = []
    with parts_folder(tmp_path) as folder:
        first = folder.run(squares(tmp_path, 3), on_done=lambda name, is_old: seen.append((name, is_old)))
        again = folder.run(squares(tmp_path), mapper=lambda do, parts: reversed([do(part) for part in parts]))
    with parts_folder(tmp_path) as folder:
        assert folder.run(squares(tmp_path), on_done=lambda name, is_old: seen.append((name, is_old))) == again
        assert folder.items == ["a", "b"]
        assert (folder.path / "p4" / "square.txt").read_text() == "16"
    assert first == {f"p{number}": {"square": number**2} for number in range(3)}
    assert list(again or {}) == [f"p{number}" for number in range(5)]
    assert done_in(tmp_path) == [0, 1, 2, 3, 4]
    assert seen[:3] == [(f"p{number}", False) for number in range(3)]
    assert sorted(seen[3:]) == [(f"p{number}", True) for number in range(5)]


def test_an_error_of_a_part_comes_through_and_leaves_nothing_of_it(tmp_path):
    """The parts that were done before stay."""
    with parts_folder(tmp_path) as folder:
        with pytest.raises(ValueError, match=r"text\.jsonl:3"):
            folder.run([*squares(tmp_path, 2), Part("bad", refuse, {})])
        assert {path.name for path in folder.path.iterdir()} == {".lock", "plan.json", "p0", "p1"}


def test_leftovers_of_killed_tries_are_removed_at_the_start(tmp_path, monkeypatch):
    """Unfinished parts and locks go; a part that was cut short, or is of another plan, is done again."""
    monkeypatch.setattr(work, "PATIENCE_SECONDS", 0)
    with parts_folder(tmp_path) as folder:
        folder.run(squares(tmp_path))
    (folder.path / "p7.tmp-host-1-2").mkdir()
    (folder.path / "p7.lock").touch()
    (folder.path / "p1" / "square.txt").write_text("")
    record = json.loads((folder.path / "p2" / "part.json").read_text())
    (folder.path / "p2" / "part.json").write_text(json.dumps({**record, "plan": "other"}))
    (folder.path / "p3" / "part.json").unlink()
    with parts_folder(tmp_path) as folder:
        assert not list(folder.path.glob("p7*"))
        folder.run(squares(tmp_path))
        assert (folder.path / "p1" / "square.txt").read_text() == "1"
    assert done_in(tmp_path) == [0, 1, 2, 3, 4, 1, 2, 3]


def test_an_error_of_the_disk_does_not_cost_a_part_that_is_done(tmp_path, monkeypatch):
    """It comes through; a file that appears a little later is waited for."""
    with parts_folder(tmp_path) as folder:
        folder.run(squares(tmp_path, 1))
        place, plan = folder.path / "p0", folder.plan_sha256

        def fail(*args, **keywords) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(work, "read_json_object", fail)
            with pytest.raises(OSError, match="Input/output"):
                read_facts(place, plan=plan)
        for name in ("part.json", "square.txt"):
            hidden = (place / name).rename(tmp_path / name)
            appearing = threading.Timer(0.2, hidden.rename, [place / name])
            appearing.start()
            assert read_facts(place, plan=plan) == {"square": 0}
            appearing.join()
    assert done_in(tmp_path) == [0]


def test_other_settings_are_refused_in_words(tmp_path):
    """The message names what differs, and both values; with `restart` the old parts go instead, but not of shares."""
    with parts_folder(tmp_path, settings=[{"path": "a.txt", "bytes": 10}]) as folder:
        folder.run(squares(tmp_path, 1))
    changed = [{"path": "a.txt", "bytes": 12}]
    share = ClusterConfig(on="share", share="1/1")
    for others in ({}, {"restart": True, "cluster": share}):
        with (
            pytest.raises(ValueError, match=r"found value\.0\.bytes = 10, now 12; .* remove the folder"),
            parts_folder(tmp_path, settings=changed, **others),
        ):
            pass
    with pytest.raises(ValueError, match="found 1 of value, now 2"), parts_folder(tmp_path, settings=changed * 2):
        pass
    with (
        pytest.warns(UserWarning, match=r"beginning anew, since .* value\.0\.bytes = 10, now 12"),
        parts_folder(tmp_path, settings=changed, restart=True) as folder,
    ):
        assert {path.name for path in folder.path.iterdir()} == {".lock", "plan.json"}


def test_a_folder_of_the_user_is_not_taken(tmp_path):
    """Files of others in its place are refused, not removed."""
    (tmp_path / "out.parts").mkdir()
    (tmp_path / "out.parts" / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"found thesis\.txt in it; move it away"), parts_folder(tmp_path):
        pass
    assert (tmp_path / "out.parts" / "thesis.txt").exists()


def test_one_process_holds_the_folder_or_any_number_of_shares(tmp_path):
    """Two commands do not work on the same output; shares do, but not beside such a command."""
    share = ClusterConfig(on="share", share="1/2")
    with (
        parts_folder(tmp_path),
        pytest.raises(FileExistsError, match="only process here"),
        parts_folder(tmp_path, cluster=share),
    ):
        pass
    with (
        parts_folder(tmp_path, cluster=share),
        parts_folder(tmp_path, cluster=share),
        pytest.raises(FileExistsError, match="only process here"),
        parts_folder(tmp_path),
    ):
        pass


def test_the_folder_goes_after_publishing_and_a_removal_that_was_killed_is_finished(tmp_path):
    """Parts without a plan are thrown away by the next start."""
    with parts_folder(tmp_path) as folder:
        folder.run(squares(tmp_path, 2))
        (folder.path / "plan.json").unlink()
    with parts_folder(tmp_path) as folder:
        assert {path.name for path in folder.path.iterdir()} == {".lock", "plan.json"}
        folder.remove()
        assert not folder.path.exists()
        assert not folder.is_there


def test_a_share_begins_with_its_own_parts_and_finishes_those_that_nobody_holds(tmp_path):
    """Share 2 of 3 does parts 1 and 4 first, then the others."""
    with parts_folder(tmp_path, cluster=ClusterConfig(on="share", share="2/3")) as folder:
        facts = folder.run(squares(tmp_path))
    assert facts is not None
    assert done_in(tmp_path)[:2] == [1, 4]
    assert sorted(done_in(tmp_path)) == [0, 1, 2, 3, 4]


def test_a_share_leaves_what_another_one_is_doing(tmp_path, monkeypatch):
    """It returns None: whoever finishes last goes on."""
    monkeypatch.setattr("transformerlm.distributed.share_work.PATIENCE_SECONDS", 0)
    share = ClusterConfig(on="share", share="1/1")
    with parts_folder(tmp_path, cluster=share) as folder, folder.alone("p3") as held:
        assert held
        with parts_folder(tmp_path, cluster=share) as other:
            assert other.run(squares(tmp_path)) is None
    assert sorted(done_in(tmp_path)) == [0, 1, 2, 4]


def test_a_share_that_finds_the_folder_gone_is_done(tmp_path):
    """Another one has published; an error while the folder is there is an error."""
    share = ClusterConfig(on="share", share="1/1")
    with parts_folder(tmp_path, cluster=share) as folder, parts_folder(tmp_path, cluster=share) as other:
        folder.run(squares(tmp_path, 1))
        folder.remove()
        assert other.run(squares(tmp_path)) is None
    missing = Part("p9", write_square, {"number": 9, "log": str(tmp_path / "nowhere" / "log")})
    with parts_folder(tmp_path, cluster=share) as folder, pytest.raises(FileNotFoundError, match="nowhere"):
        folder.run([missing])


def test_what_a_share_wrote_into_a_folder_that_was_being_removed_goes_too(tmp_path):
    """It came too late for the other one to see it; the next command would have found a folder that is nobody's."""
    share = ClusterConfig(on="share", share="1/1")
    with parts_folder(tmp_path, cluster=share) as folder, parts_folder(tmp_path, cluster=share) as other:
        folder.remove()
        (other.path / "late").mkdir(parents=True)
        (other.path / "mark").touch()
    assert not other.path.exists()


def test_a_newer_folder_of_the_same_name_is_left_alone(tmp_path):
    """Another command may begin it after the removal, before this share ends; its plan is still to come."""
    share = ClusterConfig(on="share", share="1/1")
    with parts_folder(tmp_path, cluster=share) as folder:
        folder.remove()
        folder.path.mkdir()
        (folder.path / ".lock").touch()
    assert folder.path.exists()


def test_the_first_of_two_that_do_the_same_part_wins(tmp_path):
    """The second finds the part in place, takes its facts and leaves nothing: as where a file system has no locks."""
    parts = squares(tmp_path, 1)
    with parts_folder(tmp_path) as folder:

        def write_late(path: Path, **arguments) -> dict[str, int]:
            first = threading.Thread(target=do_part, args=(folder.path, folder.plan_sha256, parts[0]))
            first.start()
            first.join()
            return write_square(path, number=8, log=arguments["log"])

        late = Part("p0", write_late, parts[0].arguments)
        assert do_part(folder.path, folder.plan_sha256, late) == "p0"
        assert read_facts(folder.path / "p0", plan=folder.plan_sha256) == {"square": 0}
        assert {path.name for path in folder.path.iterdir()} == {".lock", "plan.json", "p0"}


def test_a_share_that_waits_asks_little_of_the_disk(tmp_path, monkeypatch):
    """It opens no lock of a part that is there, and looks less often the longer others take."""
    share = ClusterConfig(on="share", share="1/1")
    held, pauses = [], []
    hold = share_work.hold

    def noted(path: Path) -> AbstractContextManager[bool]:
        held.append(path.name)
        return hold(path)

    with parts_folder(tmp_path, cluster=share) as folder:
        parts = squares(tmp_path, 3)

        def rest(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 7:
                do_part(folder.path, folder.plan_sha256, parts[1])

        do_part(folder.path, folder.plan_sha256, parts[0])
        monkeypatch.setattr(share_work, "hold", noted)
        monkeypatch.setattr(share_work.time, "sleep", rest)
        with folder.alone("p1"):
            do = partial(do_part, folder.path, folder.plan_sha256)
            assert list(share_work.do_share(do, parts, folder=folder.path, share="1/1", wait=True)) == ["p2"]
    assert held == ["p1", "p2", *["p1"] * 6]
    assert pauses[:3] == [0.3, 0.6, 1.2]
    assert pauses[-2:] == [5.0, 5.0]


def test_a_share_begins_no_part_of_a_folder_that_is_being_removed(tmp_path):
    """The plan goes first, then the parts: what is missing then was done, and is done by nobody again."""
    share = ClusterConfig(on="share", share="1/1")
    with parts_folder(tmp_path, cluster=share) as folder:
        (folder.path / share_work.PLAN).unlink()
        assert folder.run(squares(tmp_path, 3)) is None
    assert not (tmp_path / "log").exists()


def test_slurms_variables_say_which_share_this_is():
    """A job array's tasks, processes that `srun` started, both together; else a line says what is missing."""
    array = {
        "SLURM_ARRAY_TASK_ID": "14",
        "SLURM_ARRAY_TASK_MIN": "10",
        "SLURM_ARRAY_TASK_STEP": "2",
        "SLURM_ARRAY_TASK_COUNT": "5",
    }
    processes = {"SLURM_PROCID": "1", "SLURM_NTASKS": "3"}
    assert own_share("3/100", array) == (2, 100)
    assert own_share(None, array) == (2, 5)
    assert own_share(None, processes) == (1, 3)
    assert own_share(None, array | processes) == (7, 15)
    with pytest.raises(ValueError, match="expected a share such as"):
        own_share(None, {})


KILLED = """
import os, signal, sys
from pathlib import Path
from config.schemas import ClusterConfig
from transformerlm.distributed.parts_folder import PartsFolder
from transformerlm.distributed.work import Part

def die(folder, **arguments):
    (folder / "half.txt").write_text("ha")
    os.kill(os.getpid(), signal.SIGKILL)

cluster = ClusterConfig(on=sys.argv[2], share="1/1" if sys.argv[2] == "share" else None)
with PartsFolder(Path(sys.argv[1]), {"value": 1}, list_items=lambda: ["a", "b"], cluster=cluster) as folder:
    folder.run([Part("p0", die, {})])
"""


@pytest.mark.parametrize("on", ["local", "share"])
def test_a_killed_process_leaves_a_part_in_hand_that_the_next_one_removes(tmp_path, on):
    """Its lock ends with it; another machine's unfinished part stays while shares work."""
    program = [sys.executable, "-c", KILLED, str(tmp_path / "out.parts"), on]
    assert subprocess.run(program, timeout=120).returncode == -9
    assert list((tmp_path / "out.parts").glob("p0.tmp-*/half.txt"))
    (tmp_path / "out.parts" / "p1.tmp-elsewhere-1-2").mkdir()
    with parts_folder(tmp_path, cluster=ClusterConfig(on=on, share="1/1" if on == "share" else None)) as folder:
        left = [path.name for path in folder.path.glob("*.tmp-*")]
        assert left == (["p1.tmp-elsewhere-1-2"] if on == "share" else [])
        assert folder.run(squares(tmp_path, 1)) == {"p0": {"square": 0}}


def test_a_share_removes_only_what_nobody_can_be_at_work_on(tmp_path):
    """A host whose name begins with this one's is another machine; of this one, what somebody holds stays, too."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    others, held, left = (
        f"{name}-{ended.pid}-1" for name in (f"p1.tmp-{host}-abc", f"p2.tmp-{host}", f"p3.tmp-{host}")
    )
    share = ClusterConfig(on="share", share="1/1")
    with parts_folder(tmp_path, cluster=share) as folder, folder.alone("p2"):
        for name in (others, held, left):
            (folder.path / name).mkdir()
        with parts_folder(tmp_path, cluster=share):
            assert {path.name for path in folder.path.glob("*.tmp-*")} == {others, held}


def test_neither_ray_nor_torch_is_imported_unless_asked(tmp_path):
    """The rooms that do parts bring neither."""
    program = "import sys, transformerlm.distributed.parts_folder; print({'ray', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()", done.stderr
