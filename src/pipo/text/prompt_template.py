"""A user's Jinja template of one prompt, over the columns of a table, in the sandbox that chat templates have."""

from __future__ import annotations

from collections.abc import Mapping

import jinja2
from jinja2 import meta, nodes

from pipo.base.errors import MalformedFile, UsageError
from pipo.text.chat_template import render_bounded, said, sandbox

_FORGIVING = {"defined", "undefined", "default", "d"}  # tests and filters of a name that need not be there


class PromptTemplate:
    """`columns` are the names it reads, `needed` those of them that must be there. Threads: any.

    Raises UsageError where the source is not a template.
    """

    def __init__(self, source: str) -> None:
        environment = sandbox(jinja2.StrictUndefined)
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"the prompt template is not valid Jinja, line {error.lineno}: {said(error.message)}"
            ) from (error)
        except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:  # nested too deep
            raise UsageError(f"the prompt template does not compile: {said(error)}") from error
        self.columns = frozenset(meta.find_undeclared_variables(tree)) - environment.globals.keys()
        self.needed = self.columns - _forgiven(tree) - _assigned(tree)

    def render(self, row: Mapping[str, object]) -> str:
        """Raises UsageError where the row lacks a column, or the template fails on what it has.

        Raises MemoryError and TimeoutError, where the caller has bounds for them.
        """
        try:
            return render_bounded(self._template, row)
        except (MemoryError, TimeoutError):
            raise
        except jinja2.UndefinedError as error:
            raise UsageError(f"the prompt template wants what this row does not have: {said(error.message)}") from error
        except MalformedFile as error:
            raise UsageError(error.message.replace("chat template", "prompt template")) from error
        except Exception as error:  # a template can raise whatever its expressions do
            raise UsageError(f"the prompt template failed: {type(error).__name__}: {said(error)}") from error


def _forgiven(tree: nodes.Template) -> set[str]:
    """Names that the template itself asks after."""
    asked = (node for node in tree.find_all((nodes.Test, nodes.Filter)) if node.name in _FORGIVING)
    return {node.node.name for node in asked if isinstance(node.node, nodes.Name)}


def _assigned(tree: nodes.Template) -> set[str]:
    """Names that the template itself gives a value, if only in a branch."""
    return {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"}
