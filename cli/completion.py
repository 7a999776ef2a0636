"""Scripts with which a shell completes our options: they are written once, so that no key press waits for Python.

They understand `--key=value`, which bash splits at the `=`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

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
        self.program, _, self.word = name.partition(" ")
        self.verb = self.program.removeprefix(f"{MAIN}-")
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
        return _function(self.name)


def _function(name: str) -> str:
    return "_" + re.sub(r"\W", "_", name)


def completion_script(shell: str, commands: Sequence[Completed]) -> str:
    """Return a shell's script for some commands; for several programs, also for `transformerlm` with them as words."""
    writer = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]
    return "\n".join(writer(commands))


def _programs(commands: Sequence[Completed]) -> dict[str, list[Completed]]:
    """Return the commands by program; one such as `transformerlm-runs` has several, each with a word."""
    programs: dict[str, list[Completed]] = defaultdict(list)
    for command in commands:
        programs[command.program].append(command)
    return programs


def _words(commands: Sequence[Completed]) -> str:
    return " ".join(command.word for command in commands)


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
}}"""

_BASH_WORDS = """\
{function}() {{
  local word
  for word in "${{COMP_WORDS[@]:1:$((COMP_CWORD - 1))}}"; do
    case "$word" in
{cases}
    esac
  done
  COMPREPLY=($(compgen -W "{words} --help --version --print-completion" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}"""

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
        yield _BASH.format(function=command.function, options=options, cases="\n".join(cases))
    programs = _programs(commands)
    for program, some in programs.items():
        if some[0].word:
            cases = (f"      {command.word}) {command.function}; return ;;" for command in some)
            yield _BASH_WORDS.format(function=_function(program), words=_words(some), cases="\n".join(cases))
        yield f"complete -o default -F {_function(program)} {program}"
    if len(programs) > 1:
        verbs = [(some[0].verb, _function(program)) for program, some in programs.items()]
        cases = (f"    {verb}) {function} ;;" for verb, function in verbs)
        yield _BASH_MAIN.format(main=MAIN, verbs=" ".join(verb for verb, _ in verbs), cases="\n".join(cases))


# --- zsh ---------------------------------------------------------------------------------------------------------

_ZSH_WORDS = """\
{function}() {{
  if (( CURRENT == 2 )); then
    compadd {words} --help --version --print-completion
    return
  fi
  shift words
  (( CURRENT-- ))
  case $words[1] in
{cases}
  esac
}}
compdef {function} {name}"""


def _zsh(commands: Sequence[Completed]) -> Iterator[str]:
    for command in commands:
        yield f"{command.function}() {{\n  _arguments \\"
        yield from (f"    {_zsh_option(option)} \\" for option in command.options)
        yield "    '*:file:_files'\n}" + ("" if command.word else f"\ncompdef {command.function} {command.name}")
    programs = _programs(commands)
    for program, some in programs.items():
        if some[0].word:
            yield _zsh_words(_function(program), program, {command.word: command.function for command in some})
    if len(programs) > 1:
        functions = {some[0].verb: _function(program) for program, some in programs.items()}
        yield _zsh_words(f"_{MAIN}_", MAIN, functions)


def _zsh_words(function: str, name: str, functions: dict[str, str]) -> str:
    cases = "\n".join(f"    {word}) {of_word} ;;" for word, of_word in functions.items())
    return _ZSH_WORDS.format(function=function, name=name, words=" ".join(functions), cases=cases)


def _zsh_option(option: Option) -> str:
    text = re.sub(r"([\[\]:\\])", r"\\\1", option.text).replace("'", "'\\''")
    if option.words is None:
        return f"'--{option.name}[{text}]'"
    action = f"({' '.join(option.words)})" if option.words else "_files"
    after = "=-" if option.is_alone else "="
    return f"'*--{option.name}{after}[{text}]:{':' * option.is_alone}value:{action}'"


# --- fish --------------------------------------------------------------------------------------------------------


def _fish(commands: Sequence[Completed]) -> Iterator[str]:
    programs = _programs(commands)
    for program, some in programs.items():
        yield from _fish_program(program, some, before=[])
    if len(programs) > 1:
        verbs = " ".join(some[0].verb for some in programs.values())
        yield f"complete -c {MAIN} -n __fish_use_subcommand -f -a '{verbs} --help --version --print-completion'"
        for some in programs.values():
            yield from _fish_program(MAIN, some, before=[f"__fish_seen_subcommand_from {some[0].verb}"])


def _fish_program(program: str, commands: Sequence[Completed], *, before: list[str]) -> Iterator[str]:
    """Yield the lines of a program's options, of each of its words if it has some, under the conditions `before`."""
    if commands[0].word:
        no_word = f"not __fish_seen_subcommand_from {_words(commands)}"
        yield f"complete -c {program}{_fish_when([*before, no_word])} -f -a '{_words(commands)}'"
    for command in commands:
        when = _fish_when([*before, *[f"__fish_seen_subcommand_from {command.word}"] * bool(command.word)])
        yield from (f"complete -c {program}{when} {_fish_option(option)}" for option in command.options)


def _fish_when(conditions: Sequence[str]) -> str:
    return f" -n '{'; and '.join(conditions)}'" if conditions else ""


def _fish_option(option: Option) -> str:
    text = option.text.replace("\\", "\\\\").replace("'", "\\'")
    takes = f" -x -a '{' '.join(option.words)}'" if option.words else "" if option.words is None else " -r"
    return f"-l {option.name}{'' if option.is_alone else takes} -d '{text}'"
