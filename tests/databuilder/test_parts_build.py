"""A build by parts gives the files of a build in one pass, whoever does the parts and whatever is killed."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.schemas import ClusterConfig
from databuilder import BuildReport, Source, build_dataset, parts, parts_build, parts_output
from databuilder.build import Build
from tests.utils.packed import write_parquet, zstd
from transformerlm.distributed import parts_folder, share_work
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.tokenizer import Tokenizer
from transformerlm.tokenizer.chat import ChatFormat
from transformerlm.utils.lock import try_lock

EOT = "<|endoftext|>"
BYTES = {number: bytes([number]) for number in range(256)} | {256: EOT.encode()}
TOKENIZER = Tokenizer(BYTES, [], [EOT])
HALF = {"valid_fraction": 0.3}


def cluster(on: str = "local", **keys: Any) -> ClusterConfig:
    """Return a cluster with parts of 4 kB, smaller than the schema allows."""
    return ClusterConfig.model_construct(**{**dict(ClusterConfig(on=on)), "part_mb": 0.004, **keys})  # type: ignore[arg-type]


def documents(name: str, number: int, seed: int = 0) -> list[str]:
    rng = random.Random(f"{name}{seed}")
    words = [" one", " two", "\n\n", "é漢", "'s", "  x", "42", ""]
    return [f"{name} {index} " + "".join(rng.choices(words, k=rng.randint(0, 40))) for index in range(number)]


def all_kinds(folder: Path) -> list[Source]:
    """Write each kind of file, with blank documents, invalid UTF-8, empty files, and a document of many parts."""
    folder.mkdir(exist_ok=True)
    text = EOT.join([*documents("plain", 200), "", "  \n", *documents("more", 50)]).encode()
    (folder / "a.txt").write_bytes(text[:3000] + b"\xff\xe2\x82 " + text[3000:] + b" \xf0\x9f")
    (folder / "b.txt").write_bytes(
        (documents("short", 1)[0] + EOT + "long " * 3000 + EOT + "end" + EOT + "\n").encode()
    )
    for name in ("c", "d"):
        (folder / f"{name}.txt").write_text("")
    for number in range(12):
        (folder / f"small{number}.txt").write_text(EOT.join(documents(f"small{number}", number)))
    (folder / "e.txt.gz").write_bytes(gzip.compress(EOT.join(documents("gzip", 200)).encode()))
    (folder / "f.txt.zst").write_bytes(zstd(EOT.join(documents("zstd", 200)).encode()))
    lines = [json.dumps({"body": one}) for one in [*documents("lines", 200), "  ", f"spelled {EOT} here"]]
    (folder / "g.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"body": "\xff"}')
    write_parquet(folder / "h.parquet", {"body": documents("rows", 200)}, row_group_size=20)
    return [
        Source(folder / "g.jsonl", 2.5, text_field="body"),
        Source([folder / "a.txt", folder / "b.txt", folder / "c.txt", f"{folder}/small*"], 0.5),
        Source([folder / "d.txt", folder / "e.txt.gz", folder / "f.txt.zst"], 1),
        Source(folder / "h.parquet", 3, text_field="body"),
    ]


def build(folder: Path, inputs: Any, *, kind: str = "npy", **options: Any) -> BuildReport | None:
    paths: dict[str, Any] = {"train_path": folder / f"train.{kind}"}
    if options.get("valid_fraction"):
        paths["valid_path"] = folder / "held" / f"valid.{kind}"
    return build_dataset(inputs, **{"tokenizer": TOKENIZER, **paths, **options})


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def told(report: BuildReport | None) -> list[Any]:
    """Return what a report says but for the seconds and the folder."""
    assert report is not None
    splits = [
        (split.tokens, split.bytes, split.documents, split.sources) for split in (report.train, report.valid) if split
    ]
    return [splits, report.invalid_utf8, report.empty_documents]


def ids_of(path: Path) -> list[int]:
    dataset = TokenDataset(path)
    dataset.check()
    tokens = dataset.tokens
    return tokens.tolist() if isinstance(tokens, np.ndarray) else tokens[0 : len(tokens)].tolist()


@pytest.fixture(scope="module")
def one_pass(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Source], Path, BuildReport]:
    """The texts of every kind, and what one pass makes of them."""
    folder = tmp_path_factory.mktemp("one-pass")
    sources = all_kinds(folder / "texts")
    report = build(folder / "out", sources, **HALF)
    assert report is not None
    return sources, folder / "out", report


def test_parts_give_the_files_of_one_pass(tmp_path, one_pass):
    """Token files and sidecars are equal byte for byte, and so are the reports; no folder of parts stays."""
    sources, expected, report = one_pass
    progress: list[tuple[int, int]] = []
    made = build(
        tmp_path, sources, cluster=cluster(), progress=lambda _, done, total: progress.append((done, total)), **HALF
    )
    assert files_of(tmp_path) == files_of(expected)
    assert told(made) == told(report)
    assert progress == sorted(progress)
    assert progress[-1][0] == progress[-1][1]
    assert report.invalid_utf8 == 4
    assert len(progress) > 15


def build_shares(folder: Path, sources: Any, **options: Any) -> list[BuildReport | None]:
    """Build with three shares at once, and return what each reports."""
    reports: list[BuildReport | None] = []
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            reports.append(build(folder, sources, cluster=cluster("share", share=f"{number}/3"), **HALF, **options))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2, 3)]
    with warnings.catch_warnings():  # which is not for threads: this restores what they leave
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    return reports


def assert_made_by_shares(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """Assert that files are equal byte for byte, but that the JSONs of shares have the settings' sha256, too."""
    assert found.keys() == expected.keys()
    for name, data in found.items():
        if name.endswith(".json"):
            facts, others = json.loads(data), json.loads(expected[name])
            assert len(facts.pop("settings_sha256")) == 64
            assert facts.pop("sidecar_sha256") != others.pop("sidecar_sha256")
            assert list(facts.items()) == list(others.items())
        else:
            assert data == expected[name], name


def test_shares_give_the_files_of_one_pass(tmp_path, one_pass):
    """Three shares at once: one of them writes the files, the others report nothing."""
    sources, expected, report = one_pass
    reports = build_shares(tmp_path, sources)
    assert_made_by_shares(files_of(tmp_path), files_of(expected))
    assert [told(one) for one in reports if one is not None] == [told(report)]
    assert build(tmp_path, sources, cluster=cluster("share", share="2/3"), **HALF) is None  # a late one


def test_three_shares_at_once_write_the_shards_of_one_process(tmp_path, one_pass):
    """They come to the writing of shards together, each with all that it needs."""
    sources, _, report = one_pass
    build(tmp_path / "alone", sources, kind="shards", **HALF, cluster=cluster())
    for number in range(3):
        reports = build_shares(tmp_path / str(number), sources, kind="shards")
        assert [told(one) for one in reports if one is not None] == [told(report)]
        assert_made_by_shares(files_of(tmp_path / str(number)), files_of(tmp_path / "alone"))


@pytest.mark.parametrize("on", ["local", "share"])
def test_shards_hold_the_ids_of_one_pass(tmp_path, one_pass, on):
    """In order, train and valid, and the index says what the sidecar says; whole weights need no copies."""
    sources, expected, report = one_pass
    share = {"share": "1/1"} if on == "share" else {}
    made = build(tmp_path, sources, kind="shards", cluster=cluster(on, **share), **HALF)
    assert told(made) == told(report)
    assert sorted(os.listdir(tmp_path)) == ["held", "train.shards"]
    assert os.listdir(tmp_path / "held") == ["valid.shards"]
    for name in ("train", "held/valid"):
        assert ids_of(tmp_path / f"{name}.shards") == np.load(expected / f"{name}.npy").tolist()
        index = json.loads((tmp_path / f"{name}.shards" / "index.json").read_text())
        sidecar = json.loads((expected / f"{name}.json").read_text())
        own = {"format", "sha256", "sidecar_sha256", "documents_sha256", "settings_sha256"}
        assert {key: value for key, value in index.items() if key not in own | {"shards"}} == {
            key: value for key, value in sidecar.items() if key not in own
        }
    listed = json.loads((tmp_path / "train.shards" / "index.json").read_text())["shards"]
    assert len(listed) > len({one["file"] for one in listed}) > 10


@pytest.mark.parametrize("kind", ["npy", "shards"])
def test_without_a_split_each_document_is_in_train(tmp_path, kind):
    """A small text in shards is one shard; in parts it is what one pass gives."""
    (tmp_path / "in.txt").write_text(EOT.join(documents("a", 100)))
    report = build(tmp_path / "whole", tmp_path / "in.txt")
    made = build(tmp_path / "parts", tmp_path / "in.txt", kind=kind, cluster=cluster())
    assert told(made) == told(report)
    assert ids_of(tmp_path / "parts" / f"train.{kind}") == np.load(tmp_path / "whole" / "train.npy").tolist()


@pytest.mark.parametrize("seed", range(4))
def test_any_size_of_parts_gives_the_same_files(tmp_path, seed):
    """Parts that end at any document, with blank ones and empty files between."""
    rng = random.Random(seed)
    for number in range(4):
        texts = [rng.choice(["", " ", "\n\n", "one", "é" * rng.randint(1, 300)]) for _ in range(rng.randint(0, 60))]
        (tmp_path / f"{number}.txt").write_bytes(EOT.join(texts).encode() + rng.choice([b"", b"\xff", EOT.encode()]))
    fraction = rng.choice([0.0, 0.2])
    expected = build(tmp_path / "a", f"{tmp_path}/*.txt", valid_fraction=fraction)
    size = rng.randint(10, 400) / 1e6
    made = build(tmp_path / "b", f"{tmp_path}/*.txt", valid_fraction=fraction, cluster=cluster(part_mb=size))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert told(made) == told(expected)


def test_a_killed_build_goes_on_where_it_was(tmp_path, one_pass, monkeypatch):
    """After an interruption at any step, the same call does nothing twice but the part in hand."""
    sources, expected, _ = one_pass
    steps: list[str] = []
    stop_at = ""

    def watched(name: str, original):
        def call(*args, **keywords):
            steps.append(name)
            if stop_at == f"{name} {steps.count(name)}":
                raise KeyboardInterrupt
            return original(*args, **keywords)

        return call

    for name in ("encode_part", "write_token_files", "put_in_place"):
        monkeypatch.setattr(parts_build, name, watched(name, getattr(parts_build, name)))
    build(tmp_path / "whole", sources, cluster=cluster(), **HALF)
    number = steps.count("encode_part")
    places = ["encode_part 1", "encode_part 7", f"encode_part {number}", "write_token_files 1", "put_in_place 1"]
    for stop_at in [*places, "put_in_place 2"]:
        steps.clear()
        folder = tmp_path / stop_at
        with pytest.raises(KeyboardInterrupt):
            build(folder, sources, cluster=cluster(), **HALF)
        stop_at = ""
        build(folder, sources, cluster=cluster(), **HALF)
        assert files_of(folder) == files_of(expected)
        assert steps.count("encode_part") <= number + 1
    with pytest.raises(FileExistsError, match="expected no such file yet"):
        build(folder, sources, cluster=cluster(), **HALF)


CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATTING = Tokenizer(
    BYTES | {257 + number: token.encode() for number, token in enumerate(CHAT_TOKENS)}, [], [EOT, *CHAT_TOKENS]
)
KILLED = """
import os, signal, sys
from databuilder import parts_build
from tests.databuilder.test_parts_build import build_conversations

folder, kind, name, calls = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
original, left = getattr(parts_build, name), [calls]

def killed(*args, **keywords):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **keywords)

setattr(parts_build, name, killed)
build_conversations(folder, kind)
"""


def build_conversations(folder: str, kind: str, *, cut: bool = True) -> None:
    """Build token files and masks of conversations in parts of 4 kB, or in one pass."""
    where = {"cluster": cluster()} if cut else {}
    inputs = [Source(Path(folder).parent / "chat.jsonl", 1.5, text_field="messages")]
    build(Path(folder), inputs, kind=kind, tokenizer=CHATTING, chat=ChatFormat(), num_workers=1, **HALF, **where)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("kind", "name", "calls"), [("npy", "encode_part", 3), ("npy", "put_in_place", 2), ("shards", "encode_part", 4)]
)
def test_a_killed_build_of_conversations_gives_the_files_of_one_that_was_not(tmp_path, kind, name, calls):
    """After SIGKILL in the middle the same call goes on; ids and masks are those of an uninterrupted build."""
    rows = []
    for number, text in enumerate(documents("chat", 120)):
        said = [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text[:40]} <|im_end|>"}]
        rows.append(json.dumps({"messages": said[: 1 + number % 4]}) + "\n")
    (tmp_path / "chat.jsonl").write_text("".join(rows))
    build_conversations(str(tmp_path / "whole"), kind)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), kind, name, str(calls)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = tmp_path / "killed"
    assert files_of(found) != files_of(tmp_path / "whole")
    build_conversations(str(found), kind)
    assert files_of(found) == files_of(tmp_path / "whole")
    assert any(one.endswith(".mask.npy") for one in files_of(found))
    assert TokenDataset(found / f"train.{kind}").num_learnt > 0
    if kind == "npy":
        build_conversations(str(tmp_path / "one-pass"), kind, cut=False)
        assert files_of(tmp_path / "one-pass") == files_of(found)


def test_changed_inputs_begin_anew_here_and_are_refused_by_a_share(tmp_path, monkeypatch):
    """Nothing old gets into the files; the message names what changed."""
    path = tmp_path / "in.txt"
    path.write_text(EOT.join(documents("a", 100)))

    def stop(*args: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parts_build, "put_in_place", stop)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, path, cluster=cluster())
    path.write_text(EOT.join(documents("b", 101)))
    with pytest.raises(ValueError, match=r"found sources\.0\.files\.0\.bytes = .* remove the folder to begin anew"):
        build(tmp_path, path, cluster=cluster("share", share="1/1"))
    with pytest.warns(UserWarning, match=r"beginning anew, since .* sources\.0\.files\.0\.bytes"):
        build(tmp_path, path, cluster=cluster())
    build(tmp_path / "whole", path)
    assert (tmp_path / "train.npy").read_bytes() == (tmp_path / "whole" / "train.npy").read_bytes()
    assert not (tmp_path / "train.npy.parts").exists()


@pytest.mark.parametrize("kind", ["npy", "shards"])
def test_without_locks_shares_may_publish_at_once(tmp_path, one_pass, monkeypatch, kind):
    """Each does what the others do, and the files are those of one process."""
    sources, _, _ = one_pass
    for module in (parts_folder, share_work):
        monkeypatch.setattr(module, "try_lock", lambda *args, **keywords: True)
    build(tmp_path / "alone", sources, kind=kind, **HALF, cluster=cluster())
    for number in range(3):
        reports = build_shares(tmp_path / str(number), sources, kind=kind)
        assert [one for one in reports if one is not None]
        assert_made_by_shares(files_of(tmp_path / str(number)), files_of(tmp_path / "alone"))


@pytest.mark.parametrize("kind", ["npy", "shards"])
@pytest.mark.parametrize("step", [parts_build, parts_output])
def test_a_share_that_comes_late_to_publishing_leaves_the_outputs_alone(tmp_path, monkeypatch, kind, step):
    """Where nothing locks, another one may publish and remove the parts before it begins, and while it does."""
    (tmp_path / "in.txt").write_text(EOT.join(documents("a", 100)))
    for module in (parts_folder, share_work):
        monkeypatch.setattr(module, "try_lock", lambda *args, **keywords: True)
    name = "put_in_place" if step is parts_build else "_link_all"
    original, made = getattr(step, name), {}

    def after_another(*args: Any, **keywords: Any) -> Any:
        monkeypatch.setattr(step, name, original)
        if step is parts_output:
            original(*args, **keywords)
        with ThreadPoolExecutor(1) as pool:
            share = cluster("share", share="2/2")
            assert pool.submit(build, tmp_path, tmp_path / "in.txt", kind=kind, cluster=share, **HALF).result()
        made.update(files_of(tmp_path))
        return None if step is parts_output else original(*args, **keywords)

    monkeypatch.setattr(step, name, after_another)
    assert build(tmp_path, tmp_path / "in.txt", kind=kind, cluster=cluster("share", share="1/2"), **HALF) is None
    assert len(made) > 3
    assert files_of(tmp_path) | made == made
    assert {key for key in made if key not in files_of(tmp_path)} <= {key for key in made if ".tmp-" in key}


def test_a_share_that_starts_while_another_one_publishes_has_nothing_to_do(tmp_path, monkeypatch):
    """The outputs appear between its first look and its check of what is in their place."""
    (tmp_path / "in.txt").write_text(EOT.join(documents("a", 100)))
    share = cluster("share", share="1/2")
    assert build(tmp_path, tmp_path / "in.txt", cluster=share) is not None
    answers = [False]
    is_made = Build.is_made
    monkeypatch.setattr(Build, "is_made", lambda self: answers.pop() if answers else is_made(self))
    assert build(tmp_path, tmp_path / "in.txt", cluster=share) is None


def test_leftovers_of_publishing_go_but_not_what_another_share_has_in_hand(tmp_path):
    """Of this machine those of processes that have ended; the same output's alone."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    names = [f".train.npy.tmp-{host}-{os.getpid()}-1", f".train.npy.tmp-{host}-x-{ended.pid}-1", ".train.npy.other"]
    dead = f".train.npy.tmp-{host}-{ended.pid}-1"
    for name in [*names, dead]:
        (tmp_path / name).mkdir()
    parts_output.remove_leftovers(tmp_path / "train.npy", of_others=False)
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    parts_output.remove_leftovers(tmp_path / "train.npy", of_others=True)
    assert os.listdir(tmp_path) == [".train.npy.other"]


@pytest.mark.parametrize("kind", ["npy", "shards"])
def test_a_late_share_with_other_settings_is_refused(tmp_path, kind):
    """It is not told that nothing is left to do, whatever differs; nor is it where no share made the outputs."""
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps({"text": one, "body": one}) for one in documents("a", 50)))
    late = cluster("share", share="1/2")

    def build_it(folder: str, on: ClusterConfig, **options: Any) -> BuildReport | None:
        inputs = [Source(path, options.pop("weight", 2), text_field=options.pop("field", None))]
        return build(tmp_path / folder, inputs, kind=kind, cluster=on, **{**HALF, **options})

    assert build_it("out", late) is not None
    assert build_it("out", late) is None
    made = files_of(tmp_path / "out")
    for other in (
        {"valid_fraction": 0.5}, {"weight": 3}, {"field": "body"}, {"allow_special": True}, {"invalid_utf8": "refuse"}
    ):  # fmt: skip
        with pytest.raises(FileExistsError, match="overwrite"):
            build_it("out", late, **other)
    assert files_of(tmp_path / "out") == made
    build_it("alone", cluster())
    with pytest.raises(FileExistsError, match="overwrite"):
        build_it("alone", late)


@pytest.mark.parametrize("kind", ["npy", "shards"])
def test_finished_outputs_are_not_replaced_by_a_build_with_other_settings(tmp_path, monkeypatch, kind):
    """After a stop just before the removal, only the same call may put its outputs there again."""
    path = tmp_path / "in.txt"
    path.write_text(EOT.join(documents("a", 100)))

    def stop(folder: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parts_folder.PartsFolder, "remove", stop)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "out", path, kind=kind, cluster=cluster(), **HALF)
    made = files_of(tmp_path / "out")
    with pytest.raises(FileExistsError, match="overwrite"):
        build(tmp_path / "out", path, kind=kind, cluster=cluster(), valid_fraction=0.5)
    assert files_of(tmp_path / "out") == made
    build(tmp_path / "out", path, kind=kind, cluster=cluster(), **HALF)
    assert files_of(tmp_path / "out") == {name: data for name, data in made.items() if ".parts/" not in name}


def test_a_bad_line_is_named_as_in_one_pass(tmp_path):
    """The error says file and line, also of a line in the middle of the parts."""
    lines = [json.dumps({"text": one}) for one in documents("a", 100)]
    lines[70] = "no JSON"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for keys in ({}, {"cluster": cluster()}):
        with pytest.raises(ValueError, match=r"a\.jsonl:71: expected a JSON object"):
            build(tmp_path, tmp_path / "a.jsonl", **keys)


def test_rows_that_spell_special_tokens_are_warned_of_once(tmp_path):
    """As in one pass, however many parts there are."""
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"text": f"a {EOT} b" * 20})] * 100))
    with pytest.warns(UserWarning, match="rows spell") as seen:
        build(tmp_path, tmp_path / "a.jsonl", cluster=cluster())
    assert len(seen) == 1


@pytest.mark.parametrize("kind", ["npy", "shards"])
def test_publishing_may_be_interrupted_anywhere(tmp_path, monkeypatch, kind):
    """After a stop before or after each file gets its name, and in the removal, the next call finishes it."""
    path = tmp_path / "in.txt"
    path.write_text(EOT.join(documents("a", 100)))
    build(tmp_path / "whole", path, kind=kind, cluster=cluster(), **HALF)
    expected = files_of(tmp_path / "whole")
    stop_at, calls = 0, 0

    def counted(original):
        def call(*args: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise KeyboardInterrupt
            done = original(*args, **keywords)
            calls += 1
            if calls == stop_at:
                raise KeyboardInterrupt
            return done

        return call

    for module, name in (
        (parts_output, "_link_or_copy"),
        (parts_output.files, "move_into_place"),
        (parts_output, "_link_all"),
        (Path, "rename"),
        (parts_folder, "remove"),
    ):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    build(tmp_path / "counted", path, kind=kind, cluster=cluster(), **HALF)
    for place in range(calls, calls - 30, -3):
        stop_at, calls, folder = place, 0, tmp_path / str(place)
        with pytest.raises(KeyboardInterrupt):
            build(folder, path, kind=kind, cluster=cluster(), **HALF)
        stop_at = 0
        with suppress(FileExistsError):  # after the last step everything is in place already
            build(folder, path, kind=kind, cluster=cluster(), **HALF)
        assert files_of(folder) == expected, place


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 10, "kind": "shards"}, "max_tokens: expected none with a folder of shards, found 10"),
        ({"max_tokens": 10, "cluster": cluster("share", share="1/2")}, 'expected none with cluster.on = "share"'),
        ({"overwrite": True, "cluster": cluster("share", share="1/2")}, "overwrite: expected false"),
        ({"cluster": cluster("share")}, r"cluster\.share: expected a share such as"),
        ({"valid_path": "v.npy", "valid_fraction": 0.1, "kind": "shards"}, r"a name that ends as .*train\.shards does"),
        ({"kind": "shards"}, "is there already; choose another output"),
    ],
)
def test_what_parts_cannot_do_is_refused(tmp_path, monkeypatch, options, message):
    """One line, and nothing is left behind."""
    for name in ("SLURM_PROCID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "in.txt").write_text("one")
    if options == {"kind": "shards"}:
        (tmp_path / "train.shards").mkdir()
        (tmp_path / "train.shards" / "index.json").touch()
    before = files_of(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        build(tmp_path, tmp_path / "in.txt", **options)
    assert files_of(tmp_path) == before


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds open files in /proc")
def test_an_error_of_the_disk_while_a_part_is_written_is_not_lost(tmp_path, monkeypatch):
    """The system tells it once, to the flush that meets it."""
    (tmp_path / "in.txt").write_text(EOT.join(documents("a", 100)))
    monkeypatch.setattr(parts, "_FLUSH_TOKENS", 100)
    fsync = os.fsync

    def fail_once(descriptor: int) -> None:
        if os.fstat(descriptor).st_size and os.readlink(f"/proc/self/fd/{descriptor}").endswith("/ids"):
            monkeypatch.setattr(os, "fsync", fsync)
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(OSError, match="Input/output"):
        build(tmp_path, tmp_path / "in.txt", cluster=cluster())
    assert not (tmp_path / "train.npy").exists()


def test_too_small_a_disk_is_refused_after_the_first_part(tmp_path, monkeypatch):
    """The parts and the output need room at the same time."""
    path = tmp_path / "in.txt"
    path.write_text(EOT.join(documents("a", 500)))
    usage = type("Usage", (), {"free": 3 * path.stat().st_size})
    monkeypatch.setattr(parts_output.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"expected about .* MB for the token files"):
        build(tmp_path, path, cluster=cluster())


def test_room_is_for_what_is_written(tmp_path, monkeypatch):
    """Shards have no copies of a document, and packed text says nothing of text that is not packed."""
    needed: list[int] = []
    monkeypatch.setattr(parts_build, "check_room", lambda folder, expected: needed.append(expected))
    text = EOT.join(documents("a", 500))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    for name, weight in (("once", 1.0), ("often", 20.0)):
        source = Source(tmp_path / "a.txt", weight)
        build(tmp_path / name, [source], cluster=cluster(), kind="shards")
    assert needed[0] == needed[1]
    for name, files in (("packed", ["b.txt.gz"]), ("both", ["b.txt.gz", "a.txt"])):
        build(tmp_path / name, [tmp_path / file for file in files], cluster=cluster("share", share="1/1"))
    assert needed[-1] < 2.5 * 2 * len(text.encode())


def test_what_came_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    """A file that another command has written is as safe as one that was there before."""
    path = tmp_path / "in.txt"
    path.write_text(EOT.join(documents("a", 100)))
    numbered = parts_build.numbered_parts

    def and_another(*args: Any) -> Any:
        (tmp_path / "train.npy").write_text("mine")
        return numbered(*args)

    monkeypatch.setattr(parts_build, "numbered_parts", and_another)
    with pytest.raises(FileExistsError, match=r"train\.npy: expected no such file yet, found one"):
        build(tmp_path, path, cluster=cluster())
    assert (tmp_path / "train.npy").read_text() == "mine"


def stopped_after_ten_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Begin a build that Ctrl-C ends in its eleventh part, and return its text."""
    path = folder / "in.txt"
    path.write_text(EOT.join(documents("a", 1000)))
    encode_part, begun = parts_build.encode_part, []

    def stop_late(*args: Any, **keywords: Any) -> Any:
        begun.append(args)
        if len(begun) > 10:
            raise KeyboardInterrupt
        return encode_part(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(parts_build, "encode_part", stop_late)
        with pytest.raises(KeyboardInterrupt):
            build(folder, path, cluster=cluster())
    return path


def test_progress_after_a_stop_is_that_of_the_rest(tmp_path, monkeypatch):
    """What an earlier call did took this one no time: with it the rate would be far too high."""
    path = stopped_after_ten_parts(tmp_path, monkeypatch)
    shown: list[tuple[int, int]] = []
    build(tmp_path, path, cluster=cluster(), progress=lambda _, done, total: shown.append((done, total)))
    size = path.stat().st_size
    assert shown[0][0] < 0.2 * size
    assert shown[-1][0] == shown[-1][1] < size - 8 * 4000


def test_a_ray_worker_never_takes_an_earlier_tokenizer(tmp_path):
    """It keeps the last one, and a second build may have another in the same place."""
    TOKENIZER.save(tmp_path)
    first = {"directory": str(tmp_path), "engine": "reference", "sha256": TOKENIZER.fingerprint()}
    assert parts._tokenizer_of(**first).fingerprint() == TOKENIZER.fingerprint()
    other = Tokenizer({**BYTES, 257: b"ab"}, [(b"a", b"b")], [EOT])
    other.save(tmp_path)
    assert parts._tokenizer_of(**{**first, "sha256": other.fingerprint()}).fingerprint() == other.fingerprint()
    with pytest.raises(ValueError, match="expected the tokenizer"):
        parts._tokenizer_of(**first)


def test_parts_that_are_there_need_no_room(tmp_path, monkeypatch):
    """The same call goes on where there is room for what is left, and is refused again where there is not."""
    path = stopped_after_ten_parts(tmp_path, monkeypatch)
    needed: list[int] = []
    monkeypatch.setattr(parts_build, "check_room", lambda folder, expected: needed.append(expected))
    build(tmp_path, path, cluster=cluster())
    build(tmp_path / "whole", path, cluster=cluster())
    done = 9 * 2 * 4000  # parts more than the one after which the other build looks, bytes of an id, ids at most
    assert len(needed) == 2
    assert 0.7 * done < needed[1] - needed[0] < done


@pytest.mark.parametrize("on", ["local", "share"])
def test_a_removal_that_was_killed_is_finished_by_the_next_command(tmp_path, on):
    """Not while another process is there."""
    (tmp_path / "in.txt").write_text(EOT.join(documents("a", 100)))
    share = cluster("share", share="1/1")
    assert build(tmp_path, tmp_path / "in.txt", cluster=share) is not None
    left = tmp_path / "train.npy.parts"
    (left / "encoded-000003").mkdir(parents=True)
    (left / ".lock").touch()

    def again() -> None:
        with suppress(FileExistsError):  # what a command without shares says of outputs that are there
            assert build(tmp_path, tmp_path / "in.txt", cluster=share if on == "share" else cluster()) is None

    with (left / ".lock").open("r+b") as lock:
        assert try_lock(lock, left / ".lock", shared=True)
        again()
        assert (left / "encoded-000003").exists()
    again()
    assert not left.exists()
