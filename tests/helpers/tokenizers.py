"""A small tokenizer built in memory."""

from __future__ import annotations

import json
from functools import lru_cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from helpers.golden import GOLDEN

CORPUS = ["The capital of France is Paris, and John Smith plays for the team in Rome.",
          "(He) or; jerome lives in Rome: he said that the mother tongue of Danielle Darrieux's sister is French!",
          "In {code} the official language of Brazil (and of Rome) was 日本, said Zoë; Renée's café, 1984?"]

@lru_cache
def _tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """A tokenizer of each kind in use; all but the golden ones are trained on a few sentences."""
    if kind.startswith("bytes"):
        return _golden_tokenizer(kind)
    if kind.startswith("unigram"):  # T5, XLM-R and newer SentencePiece conversions
        scheme = kind.removeprefix("unigram-")
        inner = Tokenizer(models.Unigram())
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        inner.train_from_iterator(CORPUS, trainers.UnigramTrainer(
            vocab_size=150, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False))
        inner.decoder = decoders.Metaspace(prepend_scheme=scheme)
        return _with_special(inner, "<s> $A", "<s>", bos_token="<s>")
    if kind == "llama2":  # Llama 2, Mistral: spaces made marks by the normaliser, bytes for unknown characters
        inner = Tokenizer(models.BPE())
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        words = [word for text in CORPUS for word in text.split()]  # so that nothing merges across spaces
        inner.train_from_iterator(words, trainers.BpeTrainer(
            vocab_size=60, special_tokens=["<unk>", "<s>"], show_progress=False))
        state = json.loads(inner.to_str())
        vocabulary = state["model"]["vocab"]
        vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
        state["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
        inner = Tokenizer.from_str(json.dumps(state))
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(content=" ", left=1, right=0)])
        return _with_special(inner, "<s> $A", "<s>", bos_token="<s>")
    assert kind == "wordpiece"
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.train_from_iterator(CORPUS, trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False))
    inner.decoder = decoders.WordPiece()
    return _with_special(inner, "[CLS] $A [SEP]", "[CLS]", "[SEP]", cls_token="[CLS]", sep_token="[SEP]")


def _golden_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    golden = AutoTokenizer.from_pretrained(GOLDEN / "llama" / "tiny-llama")
    if kind == "bytes":
        return golden
    inner = Tokenizer.from_str(golden.backend_tokenizer.to_str())
    end = "<|endoftext|>"
    if kind == "bytes-no-digits":  # a tokenizer that knows no digits and leaves them out
        inner.normalizer = normalizers.Replace(Regex("[0-9]"), "")
        return _with_special(inner, "$A")
    if kind == "bytes-prefix-space":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        return _with_special(inner, "$A")
    return _with_special(inner, f"{end} $A {end}" if kind == "bytes-bos-eos" else f"{end} $A", end, bos_token=end)


def _with_special(inner: Tokenizer, template: str, *special: str, **names: str) -> PreTrainedTokenizerBase:
    inner.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, inner.token_to_id(token)) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)

