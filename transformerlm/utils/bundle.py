"""Our modules as one classic script, which a page that is a file can hold under a content policy with a hash.

Browsers load no module from `file://`. This is no bundler: it knows the three forms that our modules are written in,
and refuses any other line that begins with `import` or `export`.

    import { a, b } from "/static/NAME.js";          one line, at the beginning of a file
    export const NAME = ...                          as well as `let`, `function`, `async function` and `class`

Each module becomes a function of its own, called once, after those that it imports: names of one module are hidden from
the others, as in modules. An exported `let` is what it was when its module had run.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_IMPORT = re.compile(r'import \{ ([\w, ]+) \} from "/static/([\w.]+)";')
_EXPORT = re.compile(r"export ((?:async )?(?:function\*?|class|const|let) (\w+))")


def bundled(entry: str, read: Callable[[str], str]) -> str:
    """Return a script that does what the module `entry` does; `read` returns a module's text by its name.

    Raises:
        ValueError: a line of a module is in none of the forms, or modules import each other in a circle.
    """
    written: dict[str, str] = {}

    def add(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise ValueError(f"modules import each other: {' -> '.join((*above, name))}")
        if name in written:
            return
        names, body, needed = _as_function(name, read(name))
        for other in needed:
            add(other, (*above, name))
        call = f"const {_variable(name)} = (() => {{\n{body}\nreturn {{ {', '.join(names)} }};\n}})();\n"
        written[name] = f"// --- {name} ---\n{call}"

    add(entry, ())
    return '(() => {\n"use strict";\n' + "".join(written.values()) + "})();\n"


def _as_function(name: str, text: str) -> tuple[list[str], str, list[str]]:
    """Return the names that a module exports, its lines as those of a function, and the modules that it imports."""
    names, lines, needed = [], [], []
    for number, line in enumerate(text.splitlines(), 1):
        if found := _IMPORT.fullmatch(line):
            needed.append(found[2])
            line = f"const {{ {found[1]} }} = {_variable(found[2])};"
        elif found := _EXPORT.match(line):
            names.append(found[2])
            line = found[1] + line[found.end() :]
        elif re.match(r"(import|export)\b", line):
            raise ValueError(
                f"{name}:{number}: expected an import or export as bundle.py has them, found {line[:80]!r}"
            )
        lines.append(line)
    return names, "\n".join(lines), needed


def _variable(name: str) -> str:
    return "module_" + name.removesuffix(".js").replace(".", "_")
