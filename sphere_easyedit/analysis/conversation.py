"""A conversation with a model as it was before its edits and as it is now, in which facts are edited and undone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..editing.checkpoints import load_weights, resumable, save_checkpoint
from ..editing.pipeline import apply_sphere_to_model, read_requests
from ..editing.requests import EditRequest
from ..editing.session import EditSession, resume_from
from ..editing.solve import unedited
from ..evaluation.generation import generate_continuations
from ..hparams import SPHEREHyperParams
from ..models.tokenization import is_unicode, leading_special_ids
from ..utils.messages import one_line

logger = logging.getLogger(__name__)

_Turn = dict[str, str]  # role and content, as chat templates take them


class Answers(NamedTuple):
    """What the unedited and the edited model said."""

    unedited: str
    edited: str


class Conversation:
    """Asks the unedited and the edited model the same, and edits facts into the latter.

    There is one model: the original weights of its edited layers are swapped in for the unedited model's answers.

    Args:
        model: the unedited model; holds the edited weights from here on.
        tok: its tokenizer.
        hparams: of the edits.
        undo_folder: existing folder for the weights and the session before each edit.
        max_new_tokens: maximum length of an answer, which is decoded greedily.

    Attributes:
        is_chat: whether the tokenizer has a chat template. Without one, answers are continuations without history.
    """

    def __init__(self, model: nn.Module, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams, undo_folder: Path,
                 max_new_tokens: int) -> None:
        self._model, self._tok, self._hparams = model, tok, hparams
        self._undo_folder, self._max_new_tokens = undo_folder, max_new_tokens
        self._editable = hparams.editable(model)
        self._session = EditSession.of(model)
        self._session.bind(self._editable, hparams)
        self._undoable: list[tuple[int, EditRequest]] = []  # each edit, and the number of edits before it
        self.is_chat = tok.chat_template is not None
        self.reset()

    def load(self, checkpoints: Path, num_edits: int) -> None:
        """Load the edited weights of a run, and its session if it was kept.

        Raises:
            ValueError: they are missing, damaged or of another model.
        """
        if num_edits in resumable(checkpoints):
            self._session = resume_from(self._editable, checkpoints, num_edits)
            self._session.bind(self._editable, self._hparams)
        else:
            logger.warning("no session was kept after %d edits: facts edited from here on are solved without the "
                           "earlier facts' keys", num_edits)
            load_weights(self._editable, checkpoints, num_edits)
            self._session.num_edits = num_edits

    @property
    def num_edits(self) -> int:
        """Number of facts in the edited weights."""
        return self._session.num_edits

    def reset(self) -> None:
        """Forget what was said."""
        self._turns: tuple[list[_Turn], list[_Turn]] = ([], [])  # of the unedited and the edited model

    def reply(self, message: str) -> Answers:
        """Answer a message by the chat template, each model after its own earlier answers.

        Raises:
            ValueError: the message is not text, the template fails, or the conversation exceeds the model's context.
        """
        if not self.is_chat:
            return self.continuations(message)
        message_turn = {"role": "user", "content": message}
        plain, edited = ([*turns, message_turn] for turns in self._turns)
        answers = self._both(self._templated(plain), self._templated(edited))
        for turns, answer in zip((plain, edited), answers, strict=True):
            turns.append({"role": "assistant", "content": answer})
        self._turns = (plain, edited)
        return answers

    def continuations(self, prompt: str) -> Answers:
        """Continuations of a plain prompt; the conversation is not part of it.

        Raises:
            ValueError: the prompt is not text, has no tokens or exceeds the model's context.
        """
        return self._both(prompt, prompt)

    def edit(self, prompt: str, subject: str, target_new: str) -> EditRequest:
        """Edit a fact, and forget what was said, since earlier answers would shape the next ones.

        Raises:
            ValueError, ImportError, OSError: it can't be edited (see ``apply_sphere_to_model``), or the weights before
                it can't be stored. Nothing was changed.
        """
        fact = {"prompt": prompt, "subject": subject, "target_new": target_new}
        [request] = read_requests(self._editable, self._tok, [fact], self._session)
        before = self.num_edits
        if before:  # the session itself holds the unedited weights
            save_checkpoint(self._editable, self._session, self._undo_folder)
        apply_sphere_to_model(self._model, self._tok, [fact], self._hparams, session=self._session)
        self._undoable.append((before, request))
        self.reset()
        return request

    def undo(self) -> EditRequest:
        """Take back the last edit of this conversation, bit for bit; returns it.

        Raises:
            ValueError: there is none.
        """
        if not self._undoable:
            raise ValueError("nothing to undo: no fact was edited in this conversation")
        before, request = self._undoable[-1]
        self._session.rollback(before, self._undo_folder)
        self._undoable.pop()
        self.reset()
        return request

    def _both(self, for_unedited: str, for_edited: str) -> Answers:
        edited = self._generate(for_edited)
        if not self.num_edits:  # the same weights, and so the same history
            return Answers(edited, edited)
        with unedited(self._editable, self._session):
            return Answers(self._generate(for_unedited), edited)

    def _generate(self, prompt: str) -> str:
        if not is_unicode(prompt):
            raise ValueError(f"{prompt!r} holds half a surrogate pair and so is not text: write the whole character")
        return generate_continuations(self._model, self._tok, [prompt], self._max_new_tokens)[0]

    def _templated(self, turns: list[_Turn]) -> str:
        try:
            text = str(self._tok.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program, and may raise anything
            raise ValueError(f"the model's chat template failed ({one_line(error)}): ask by a plain prompt") from error
        # Tokenising adds the special tokens again that a template begins with.
        return text.removeprefix(str(self._tok.decode(leading_special_ids(self._tok))))
