"""Talking to the unedited and the edited model, and editing and undoing facts meanwhile."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from helpers.command_line import workplace  # noqa: F401 - a fixture
from helpers.models import REQUESTS, edited_weights, tiny_hparams, tiny_model
from helpers.paths import TESTS
from helpers.processes import call_cli
from helpers.tokenizers import _tokenizer
from sphere_easyedit.analysis.conversation import Conversation
from sphere_easyedit.cli.chat import _Chat
from sphere_easyedit.cli.common import Consoles
from sphere_easyedit.editing.pipeline import apply_sphere_to_model
from sphere_easyedit.evaluation.generation import generate_continuations

CHATML = ("{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }}\n{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>{% endif %}")
TOKENIZER = TESTS / "golden" / "llama" / "tiny-llama"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests share statistics."""
    return tmp_path_factory.mktemp("chat")


def fact(number: int) -> tuple[str, str, str]:
    return REQUESTS[number]["prompt"], REQUESTS[number]["subject"], REQUESTS[number]["target_new"]


@pytest.mark.parametrize("kind", ["bytes", "bytes-bos"])
def test_each_model_answers_after_its_own_answers(kind: str, folder: Path, tmp_path: Path) -> None:
    model, tok = tiny_model("llama"), deepcopy(_tokenizer(kind))
    tok.chat_template = CHATML
    begin = "" if kind == "bytes-bos" else tok.bos_token  # the other puts it before every text, as the template does
    talk = Conversation(model, tok, tiny_hparams(folder / kind, v_num_grad_steps=4), tmp_path, 6)
    for answers in (talk.reply("Hello"), talk.reply("Are you there?")):
        assert answers.unedited == answers.edited
    talk.edit(*fact(0))
    edited = [talk.reply("Where is France?"), talk.reply("And Rome?")]
    for side, one in enumerate((tiny_model("llama"), model)):
        said = begin
        for question, answers in zip(("Where is France?", "And Rome?"), edited, strict=True):
            said += f"<|user|> {question}\n"
            assert generate_continuations(one, tok, [f"{said}<|assistant|>"], 6) == [answers[side]]
            said += f"<|assistant|> {answers[side]}\n"
    assert len(set(talk.continuations("The capital of France is"))) == 2
    talk.reset()
    assert talk.reply("Where is France?") == edited[0]


def test_facts_are_edited_and_undone_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    tok, hparams = AutoTokenizer.from_pretrained(TOKENIZER), tiny_hparams(folder / "bytes", v_num_grad_steps=4)
    model, reference = tiny_model("llama"), tiny_model("llama")
    talk = Conversation(model, tok, hparams, tmp_path, 4)
    weights = [edited_weights(model, hparams)]
    for number in (0, 1):
        assert talk.edit(*fact(number)).prompt == fact(number)[0].replace("{}", fact(number)[1])
        apply_sphere_to_model(reference, tok, [REQUESTS[number]], hparams)
        weights.append(edited_weights(reference, hparams))
        assert all(torch.equal(weight, weights[-1][layer]) for layer, weight in edited_weights(model, hparams).items())
    for wrong, error in ((("The capital of France is", "Spain", "Rome"), "'Spain' is not in prompt"),
                         (("The capital of France is", "France", ""), "target_new is ''"),
                         (("France " * 200, "France", "Rome"), "exceeds|context")):
        with pytest.raises(ValueError, match=error):
            talk.edit(*wrong)
    for left in (1, 0):
        talk.undo()
        assert talk.num_edits == left
        assert all(torch.equal(weight, weights[left][layer])
                   for layer, weight in edited_weights(model, hparams).items())
    with pytest.raises(ValueError, match="nothing to undo"):
        talk.undo()
    talk.edit(*fact(0))  # gives what it gave the first time
    assert all(torch.equal(weight, weights[1][layer]) for layer, weight in edited_weights(model, hparams).items())


def test_a_template_that_fails_is_told(tmp_path: Path) -> None:
    tok = AutoTokenizer.from_pretrained(TOKENIZER)
    tok.chat_template = "{{ raise_exception('roles must alternate') }}"
    talk = Conversation(tiny_model("llama"), tok, tiny_hparams(tmp_path), tmp_path, 4)
    with pytest.raises(ValueError, match="chat template failed .*roles must alternate"):
        talk.reply("Hello")


class CtrlC(io.StringIO):
    """Standard input at which Ctrl-C is pressed."""

    def readline(self, _size: int | None = -1) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return ""


def test_a_run_is_talked_to_on_the_command_line(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = call_cli("edit", "--hparams", "tiny.yaml", "--num-edits", "2", "--batch-size", "1", "--output", "run",
                    "--set", "v_num_grad_steps=4", "--eval-cases", "1", "--keep-weights-every", "1",
                    "--keep-checkpoints", "1", cwd=workplace)
    assert done.returncode == 0, done.stderr

    def chat(text: io.StringIO, *arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr("sys.stdin", text)
        return call_cli("chat", *arguments, "--max-new-tokens", "4", cwd=workplace)

    done = chat(io.StringIO("Hello\n\n/edit The capital of France is | Spain | Rome\n/edit nothing\n/edti\n/undo\n"
                            "/edit The capital of France is | France | Rome\n/undo\n/help\n/reset\n"
                            "/edit\nThe capital of France is\nFrance\nBonn\n/quit\nnever read\n"), "run")
    assert done.returncode == 0, done.stderr
    for said in ("tiny-llama, with 2 facts edited, has no chat", "An edited fact: /continue ", "edited (2 facts)",
                 "error: request 0 (case_id 2): subject 'Spain' is not in prompt", "error: nothing to undo",
                 "error: write /edit PROMPT | SUBJECT | TARGET", "error: /edti is no command: did you mean '/edit'?",
                 "edited (3 facts)", "Undone: The capital of France is Rome;", "/reset    forget", "new target: Bonn"):
        assert said in done.stdout
    assert "never read" not in done.stdout
    done = chat(io.StringIO("Hello\n/edit The capital of France is | France | Rome\n/undo\nHello"), "run", "--at", "1")
    assert done.returncode == 0, done.stderr
    _, before, after = done.stdout.split("> Hello\n")  # the last one ends without a line break
    assert "edited (1 fact)" in after and before.startswith(after.rstrip("\n"))
    done = chat(CtrlC(), "tiny.yaml")
    assert (done.returncode, done.stderr, "with 0 facts edited" in done.stdout) == (130, "", True)
    shutil.rmtree(workplace / "run" / "checkpoints")
    assert "kept no weights" in chat(io.StringIO(), "run").stderr


def test_answers_stand_one_below_the_other_in_a_narrow_terminal(folder: Path, tmp_path: Path) -> None:
    shown = io.StringIO()
    console, tok = Console(file=shown, width=40), AutoTokenizer.from_pretrained(TOKENIZER)
    talk = Conversation(tiny_model("llama"), tok, tiny_hparams(folder), tmp_path, 1)
    _Chat(talk, Consoles(console, console))._show(['one\x1b[31m\n"two"', "three"])
    assert shown.getvalue() == "unedited\none\\x1b[31m\n\"two\"\nedited (0 facts)\nthree\n"
