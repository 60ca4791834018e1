"""The process in which chat templates run.

Templates are someone else's programs, so they run in Jinja's sandbox and under a memory limit. The
process is the `Child` of `jaxmodel.hub.chat`, which ends it when a template takes too long. It
reads one line of JSON for each chat, and imports nothing from the project, so that it starts in a
tenth of a second.
"""

from __future__ import annotations

import datetime
import itertools
import json
import secrets
import sys
from typing import Any

MARK = "generation mark"
"""Not a name that a template could read."""


def environment() -> Any:
    """Return the Jinja environment that HF templates are written for."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag `{% generation %}`, which encloses what the assistant says, for training.

        It renders its body, between marks if they are requested.
        """

        tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

        def parse(self, parser: Any) -> Any:
            """Parse the tag and its body."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        def _said(self, caller: Any) -> str:
            mark: str = self.environment.globals[MARK]
            return f"{mark}{caller()}{mark}"

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        x: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = refuse
    made.globals[MARK] = ""
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


def answer(
    made: Any, template: str, variables: dict[str, Any], most: int, spans: bool
) -> dict[str, Any]:
    """Return `{"text"}`, with `{"spans"}` if requested; or `{"error"}`, with `{"limit"}` if any.

    A span is the start and end of what the assistant says.
    """
    pieces = []
    length = 0
    made.globals[MARK] = mark = f"\ue000{secrets.token_hex(8)}\ue000" if spans else ""
    try:
        for piece in made.from_string(template).generate(variables):
            pieces.append(piece)
            if (length := length + len(piece)) > most:
                return {
                    "error": f"it writes more than {most:,} characters",
                    "limit": "template_characters",
                }
    except MemoryError:
        return {"error": "it takes more memory than allowed", "limit": "template_memory"}
    except Exception as error:  # a template can raise any Python exception
        return {"error": str(error) or type(error).__name__}
    text = "".join(pieces)
    if not spans:
        return {"text": text}
    parts = text.split(mark)
    edges = list(itertools.accumulate(map(len, parts)))
    return {
        "text": "".join(parts),
        "spans": [edges[i : i + 2] for i in range(0, len(edges) - 1, 2)],
    }


def serve(memory: int) -> None:
    """Answer requests until the input ends."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    except (ImportError, ValueError, OSError):
        pass  # not on this system
    made = environment()
    for line in sys.stdin:
        print(json.dumps(answer(made, *json.loads(line))), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
