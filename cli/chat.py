"""`transformerlm-chat`: a checkpoint that was trained on conversations in, a conversation in the terminal out."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.chat")

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from cli.checkpoints import described
from cli.stdin_lines import stdin_lines
from cli.terminal import compiling_shown, note, working
from cli.utils import Command
from cli.utils import main as run_command
from config.chat import ChatCommandConfig
from config.suggest import closest

if TYPE_CHECKING:
    from transformerlm.inference.conversation import Conversation

# What --help shows.
SHORT = (
    "checkpoint",
    "system",
    "seed",
    "device",
    "sampling.max_new_tokens",
    "sampling.temperature",
    "sampling.top_p",
    "output.format",
)
EXAMPLES = (
    ("talk to a model; /help lists what else you can type", "--checkpoint runs/chat"),
    ("with a system message", '--checkpoint runs/chat --system "Answer in one sentence."'),
    ("a model whose checkpoint knows no chat format", "--checkpoint runs/first --toml '[chat]'"),
)
HELP = """\
/reset            forget the conversation; the system message stays
/save FILE.jsonl  add the conversation to this file as a line that transformerlm-make-data reads
/seed N           draw the answers with this seed
/system TEXT      tell the model TEXT before all messages; without TEXT, nothing
/help             this list
/exit             end, as Ctrl-D does
//...             a message that begins with a slash
Ctrl-C stops an answer; at the prompt it ends the program."""
MAX_SEED = 2**63 - 1


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-chat", ChatCommandConfig, chat, short=SHORT, examples=EXAMPLES), argv)


def chat(config: ChatCommandConfig) -> None:
    """Answer each message until the input ends.

    Raises:
        ValueError: the checkpoint has no chat format, and `[chat]` gives none.
    """
    with working("loading the model"):
        conversation = _load(config)
    assert conversation.predictor.checkpoint is not None, "it was loaded"
    note(described(config.checkpoint, conversation.predictor.checkpoint))
    talk = _Talk(config, conversation)
    with closing(_lines()) as lines, compiling_shown():
        for line in lines:
            if not talk.take(line):
                return


def _load(config: ChatCommandConfig) -> Conversation:
    from transformerlm.checkpoints.chat_format import chat_format_of, no_chat_format
    from transformerlm.checkpoints.directory import resolve
    from transformerlm.inference.conversation import Conversation
    from transformerlm.inference.predictor import Predictor
    from transformerlm.tokenizer.chat import ChatFormat

    if config.chat is not None:
        form = ChatFormat.of(config.chat.model_dump())
    elif (found := chat_format_of(resolve(config.checkpoint))) is not None:
        form = found
    else:
        raise no_chat_format(config.checkpoint)
    predictor = Predictor.from_checkpoint(
        config.checkpoint, device=config.device, precision=config.precision, reproducible=config.reproducible
    )
    return Conversation(predictor, form, system=config.system)


def _lines() -> Generator[str, None, None]:
    """Yield what is typed at the terminal, or the lines of stdin."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from stdin_lines("a message")
        return
    with suppress(ImportError):
        import readline  # noqa: F401 (it lets `input` edit lines and find earlier ones)
    note("type a message and Enter; /help lists what else you can type; Ctrl-D ends")
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            raise


class _Talk:
    """What becomes of each line: an answer, or something that a command does."""

    def __init__(self, config: ChatCommandConfig, conversation: Conversation) -> None:
        self._conversation, self._sampling = conversation, config.sampling.model_dump()
        self._seed, self._form = config.seed, config.output.format
        if self._form == "auto":
            self._form = "text" if sys.stdout.isatty() else "json"
        self._has_told = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/save": self._save,
            "/seed": self._take_seed,
            "/system": self._take_system,
            "/help": lambda rest: note(HELP),
        }

    def take(self, line: str) -> bool:
        """Do what a line asks for; return whether there may be more lines."""
        from transformerlm.utils.strings import whole_characters

        line = whole_characters(line)  # a terminal gives bytes that are not UTF-8 as halves of characters
        if not line.strip():
            return True
        if not line.startswith("/") or line.startswith("//"):
            self._answer(line.removeprefix("/"))
            return True
        word, _, rest = line.strip().partition(" ")
        if word == "/exit":
            return False
        if word in self._commands:
            self._commands[word](rest.strip())
        else:
            meant = closest(word, [*self._commands, "/exit"], cutoff=0.5)
            note(f"{word[:40]} is not a command{f' (did you mean {meant[0]}?)' if meant else ''}; /help lists them")
        return True

    def _answer(self, said: str) -> None:
        """Answer one message; Ctrl-C ends the answer alone."""
        began, is_stopped = time.perf_counter(), False
        stream = self._conversation.stream(said, seed=self._seed, **self._sampling)
        if (left_out := self._conversation.num_left_out) and not self._has_told:
            self._has_told = True
            note(f"the conversation is longer than the model's context: the {left_out} oldest messages are left out")
        pieces = []
        with _ctrl_c_heard() as heard, closing(stream):
            for piece in stream:
                pieces.append(piece)
                if self._form == "text":
                    print(piece, end="", flush=True)
                if is_stopped := bool(heard):
                    break
        if self._form == "text":
            print(flush=True)
        else:
            record = {
                "event": "answer",
                "params.seed": self._seed,
                "text.user": said,
                "text.assistant": "".join(pieces),
                "is_stopped": is_stopped,
                "messages_left_out": left_out,
                "metrics.latency_ms": 1000 * (time.perf_counter() - began),
            }
            print(json.dumps(record), flush=True)

    def _reset(self, rest: str) -> None:
        self._conversation.reset()
        self._has_told = False
        note("the conversation begins anew")

    def _take_seed(self, rest: str) -> None:
        digits = rest.lstrip("0") or "0"
        if rest.isascii() and rest.isdecimal() and int(digits[:20]) <= MAX_SEED:
            self._seed = int(digits)
        elif rest:
            note(f"/seed: expected a whole number from 0 to {MAX_SEED}, found {rest[:40]}")
        note(f"the seed is {self._seed}")

    def _take_system(self, rest: str) -> None:
        self._conversation.system = rest or None
        note("the model is told this from the next message on" if rest else "the model is told nothing before messages")

    def _save(self, rest: str) -> None:
        """Add the conversation to a file; what goes wrong is told, and the conversation goes on."""
        messages = self._conversation.messages
        if not self._conversation.turns:
            note("/save: nothing has been said yet")
        elif not rest.endswith(".jsonl"):
            note(f"/save: expected the name of a .jsonl file, found {rest[:80] or 'none'}")
        else:
            path = Path(os.path.expanduser(rest))  # Path.expanduser would refuse the name of an unknown user
            record = {"messages": [{"role": role, "content": content} for role, content in messages]}
            try:
                _add_line(path, json.dumps(record, ensure_ascii=False))
            except (OSError, ValueError) as error:  # a name with a NUL is the latter
                note(f"/save: {path}: cannot be written: {getattr(error, 'strerror', None) or error}")
            else:
                note(f"{path}: {len(messages)} messages added as a line")


def _add_line(path: Path, line: str) -> None:
    """Add a line to a file, which may be new, or have a last line without an end."""
    with path.open("ab+") as file:
        is_open = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            is_open = file.read(1) != b"\n"
        file.write(f"{chr(10) * is_open}{line}\n".encode())


@contextmanager
def _ctrl_c_heard() -> Iterator[list[int]]:
    """Give a list that Ctrl-C is added to, instead of ending the program; a second one ends it all the same."""
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(number)

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not callable(signal.getsignal(signal.SIGINT)):  # as in what a shell starts in the background
        yield heard
        return
    before = signal.signal(signal.SIGINT, hear)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, before)
