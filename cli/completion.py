"""Scripts with which a shell completes our options: they are written once, so that no key press waits for Python.

They understand `--key=value`, which bash splits at the `=`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from config.keys import Key

SHELLS = ("bash", "zsh", "fish")
# The options of every command: what follows them (None: nothing), and what they do.
COMMON: dict[str, tuple[Sequence[str] | None, str]] = {
    "config": ((), "the command's TOML file"),
    "toml": ((), "TOML to lay over the file"),
    "print-config": (("values", "origin"), "print the resolved configuration as TOML, and stop"),
    "print-schema": (None, "print the JSON schema of the TOML file, and stop"),
    "print-completion": (SHELLS, "print a script by which a shell completes the options, and stop"),
    "help": (None, "show the settings one needs most, and stop"),
    "help-all": (None, "show every setting, and stop"),
    "version": (None, "print the version, and stop"),
}
MAIN = "transformerlm"


@dataclass(frozen=True)
class Option:
    """One option: its name, the words that it takes (None: no value; empty: any), and its meaning."""

    name: str
    words: Sequence[str] | None
    text: str
    is_alone: bool  # it may be used without its value


class Completed:
    """A command to complete, with its options."""

    def __init__(self, name: str, keys: Iterable[Key]) -> None:
        self.name = name
        self.verb = name.removeprefix(f"{MAIN}-")
        self.options = [
            *(Option(option, words, text, option == "print-config") for option, (words, text) in COMMON.items()),
            *(
                Option(name, key.choices, key.description, key.is_bool)
                for key in keys
                for name in (key.name, key.short)
                if name and not key.in_list
            ),
        ]

    @property
    def function(self) -> str:
        """The name of the command's function in a script."""
        return "_" + re.sub(r"\W", "_", self.name)


def completion_script(shell: str, commands: Sequence[Completed]) -> str:
    """Return a shell's script for some commands; for several, also for `transformerlm` with them as its words."""
    writer = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]
    return "\n".join(writer(commands))


# --- bash --------------------------------------------------------------------------------------------------------

_BASH = """\
{function}() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" key="${{COMP_WORDS[COMP_CWORD-1]}}" all words joined=""
  if [ "$word" = "=" ]; then word=""; joined="="; fi
  if [ "$key" = "=" ]; then key="${{COMP_WORDS[COMP_CWORD-2]}}"; joined="="; fi
  all="{options}"
  case "$key$joined" in
{cases}
    *) words="$all" ;;
  esac
  case "$word" in -*) words="$all" ;; esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F {function} {name}"""

_BASH_MAIN = """\
_{main}_() {{
  if [ "$COMP_CWORD" = 1 ]; then
    COMPREPLY=($(compgen -W "{verbs} --help --version --print-completion" -- "${{COMP_WORDS[1]}}"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
}}
complete -o default -F _{main}_ {main}"""


def _bash(commands: Sequence[Completed]) -> Iterator[str]:
    for command in commands:
        after: dict[str, list[str]] = defaultdict(list)
        for option in command.options:
            if option.words is not None:  # without words, `-o default` completes file names
                forms = [f"--{option.name}="] if option.is_alone else [f"--{option.name}", f"--{option.name}="]
                after[" ".join(option.words)] += forms
        cases = (f'    {"|".join(forms)}) words="{words}" ;;' for words, forms in after.items())
        options = " ".join(f"--{option.name}" for option in command.options)
        yield _BASH.format(function=command.function, options=options, cases="\n".join(cases), name=command.name)
    if len(commands) > 1:
        verbs = " ".join(command.verb for command in commands)
        yield _BASH_MAIN.format(
            main=MAIN,
            verbs=verbs,
            cases="\n".join(f"    {command.verb}) {command.function} ;;" for command in commands),
        )


# --- zsh ---------------------------------------------------------------------------------------------------------

_ZSH_MAIN = """\
_{main}_() {{
  if (( CURRENT == 2 )); then
    compadd {verbs} --help --version --print-completion
    return
  fi
  shift words
  (( CURRENT-- ))
  case $words[1] in
{cases}
  esac
}}
compdef _{main}_ {main}"""


def _zsh(commands: Sequence[Completed]) -> Iterator[str]:
    for command in commands:
        yield f"{command.function}() {{\n  _arguments \\"
        yield from (f"    {_zsh_option(option)} \\" for option in command.options)
        yield f"    '*:file:_files'\n}}\ncompdef {command.function} {command.name}"
    if len(commands) > 1:
        cases = "\n".join(f"    {command.verb}) {command.function} ;;" for command in commands)
        yield _ZSH_MAIN.format(main=MAIN, verbs=" ".join(command.verb for command in commands), cases=cases)


def _zsh_option(option: Option) -> str:
    text = re.sub(r"([\[\]:\\])", r"\\\1", option.text).replace("'", "'\\''")
    if option.words is None:
        return f"'--{option.name}[{text}]'"
    action = f"({' '.join(option.words)})" if option.words else "_files"
    after = "=-" if option.is_alone else "="
    return f"'*--{option.name}{after}[{text}]:{':' * option.is_alone}value:{action}'"


# --- fish --------------------------------------------------------------------------------------------------------


def _fish(commands: Sequence[Completed]) -> Iterator[str]:
    for command in commands:
        yield from (f"complete -c {command.name} {_fish_option(option)}" for option in command.options)
    if len(commands) > 1:
        verbs = " ".join(command.verb for command in commands)
        yield f"complete -c {MAIN} -n __fish_use_subcommand -f -a '{verbs} --help --version --print-completion'"
        for command, option in chain.from_iterable(((one, option) for option in one.options) for one in commands):
            yield f"complete -c {MAIN} -n '__fish_seen_subcommand_from {command.verb}' {_fish_option(option)}"


def _fish_option(option: Option) -> str:
    text = option.text.replace("\\", "\\\\").replace("'", "\\'")
    takes = f" -x -a '{' '.join(option.words)}'" if option.words else "" if option.words is None else " -r"
    return f"-l {option.name}{'' if option.is_alone else takes} -d '{text}'"
