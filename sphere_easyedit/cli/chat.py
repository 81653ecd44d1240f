"""``chat``: talk to the unedited and the edited model side by side, and edit facts meanwhile."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.table import Column, Table
from rich.text import Text

from ..utils.messages import suggestion
from ..utils.signals import Interrupted
from .common import Consoles, load_for, set_up
from .options import At, option, read_hparams

if TYPE_CHECKING:
    from ..analysis.conversation import Conversation

_COMMANDS = MappingProxyType({
    "/edit": "PROMPT | SUBJECT | TARGET: edit a fact; asks for them if not given.",
    "/undo": "take back the last /edit.",
    "/continue": "TEXT: let both models continue a plain text.",
    "/reset": "forget the conversation, as when it outgrows the model's context.",
    "/help": "list these commands.",
    "/quit": "end (Ctrl-D does, too).",
})
_NARROW: Final = 60  # columns of a terminal below which answers are shown one below the other


def chat(
    run: Annotated[str, typer.Argument(help="Run directory; or hyperparameters (YAML file or short name), to begin "
                                            "with the unedited model.")],
    at: At = None,
    max_new_tokens: Annotated[int, option("Maximum number of new tokens per answer.", min=1)] = 60,
) -> None:
    """Talk to the unedited and the edited model side by side, and edit more facts."""
    consoles = set_up()
    with suppress(ImportError):
        import readline  # noqa: F401 - gives `input` line editing and history
    try:
        with TemporaryDirectory(prefix="sphere-chat-") as folder:
            with consoles.err.status("loading the model"):
                conversation, introduction = _begin(run, at, Path(folder), max_new_tokens)
            for line in introduction:
                consoles.print_line(line)
            _Chat(conversation, consoles).loop()
    except EOFError:
        consoles.print_line("")  # the shell's prompt begins a line
    except Interrupted as interrupted:
        consoles.print_line("")
        raise typer.Exit(interrupted.exit_status) from interrupted


def _begin(run: str, at: int | None, folder: Path, max_new_tokens: int) -> tuple[Conversation, list[str]]:
    """Load the model, unedited or with a run's edits; returns the lines to begin with, too."""
    from ..analysis.conversation import Conversation
    from ..export import ExportableRun
    from ..runs.directory import RunDirectory
    from ..runs.schema import CASES

    directory = RunDirectory(Path(run))
    if directory.path.is_dir():
        edited = ExportableRun(directory.path, at)
        hparams, dtype, prompts = edited.hparams, edited.dtype, [case.get("prompt") for case in directory.lines(CASES)]
    elif at is not None:
        raise ValueError(f"--at applies to run directories, but {run!r} is none: leave it out")
    else:
        hparams, dtype, prompts = read_hparams(run, []), None, []
    conversation = Conversation(*load_for(hparams, dtype), hparams, folder, max_new_tokens)
    if directory.path.is_dir():
        conversation.load(directory.checkpoints, edited.num_edits)
    how = ("answers by its chat template (facts are edited as plain text: /continue shows them best)"
           if conversation.is_chat else "has no chat template: it continues your text")
    lines = [f"{hparams.model_name}, with {_facts(conversation.num_edits)} edited, {how}. /help lists commands."]
    return conversation, [*lines, *(f"An edited fact: /continue {_printable(str(prompt))}" for prompt in prompts[:1])]


def _facts(number: int) -> str:
    return "1 fact" if number == 1 else f"{number} facts"


def _printable(text: str) -> str:
    """A text with control characters escaped, which could change the terminal; line breaks and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


class _Chat:
    """Reads lines from standard input and answers them."""

    def __init__(self, conversation: Conversation, consoles: Consoles) -> None:
        self._conversation, self._consoles = conversation, consoles
        self._actions = {"/edit": self._edit, "/undo": self._undo, "/continue": self._continue, "/reset": self._reset,
                         "/help": self._help}

    def loop(self) -> None:
        """Answer each line until ``/quit``. An error is printed in one line, and the chat goes on.

        Raises:
            EOFError: at the end of the input.
        """
        from ..runs.skipping import is_out_of_memory

        while (line := self._ask("> ").strip()) != "/quit":
            try:
                self._answer(line)
            except (ValueError, ImportError, OSError, RuntimeError, MemoryError) as error:
                if isinstance(error, RuntimeError | MemoryError) and not is_out_of_memory(error):
                    raise
                self._consoles.print_line(f"error: {' '.join(str(error).split())}", "red")

    def _ask(self, question: str) -> str:
        """A line of standard input; shown, too, if it was not typed."""
        if sys.stdin.isatty():
            return input(question)
        line = input()
        self._consoles.print_line(question + _printable(line))
        return line

    def _answer(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if not line.startswith("/"):
            if line:
                with self._consoles.err.status("answering"):
                    answers = self._conversation.reply(line)
                self._show(answers)
        elif command in self._actions:
            self._actions[command](rest.strip())
        else:
            raise ValueError(f"{command} is no command{suggestion(command, _COMMANDS)}")

    def _edit(self, text: str) -> None:
        fact = [part.strip() for part in text.split("|")] if text else [
            self._ask(f"{name}: ").strip() for name in ("prompt", "subject, as in the prompt", "new target")]
        if len(fact) != 3:
            raise ValueError("write /edit PROMPT | SUBJECT | TARGET, such as "
                             "/edit The capital of France is | France | Rome")
        started = perf_counter()
        with self._consoles.err.status("editing"):
            request = self._conversation.edit(*fact)
        self._consoles.print_line(f"Edited in {perf_counter() - started:.1f} s; the conversation begins anew.")
        self._continue(request.prompt)

    def _undo(self, _: str) -> None:
        request = self._conversation.undo()
        self._consoles.print_line(f"Undone: {_printable(request.prompt + request.target)}; the conversation begins "
                                  "anew.")

    def _continue(self, prompt: str) -> None:
        with self._consoles.err.status("answering"):
            answers = self._conversation.continuations(prompt)
        self._show([prompt + text for text in answers])

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._consoles.print_line("The conversation begins anew.")

    def _help(self, _: str) -> None:
        for command, text in _COMMANDS.items():
            self._consoles.print_line(f"{command:<10}{text}")

    def _show(self, answers: Iterable[str]) -> None:
        """Show two answers side by side, or one below the other in a narrow terminal."""
        titles = ("unedited", f"edited ({_facts(self._conversation.num_edits)})")
        texts = [Text(_printable(text.strip())) for text in answers]
        out = self._consoles.out
        if out.width < _NARROW:
            for title, text in zip(titles, texts, strict=True):
                out.print(Text(title, style="bold"), text, sep="\n")
            return
        table = Table(*(Column(title, overflow="fold", ratio=1) for title in titles), expand=True)
        table.add_row(*texts)
        out.print(table)
