"""Makes or loads the tokenizer of a corpus, and turns documents into token ids."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby, islice

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from training.data.documents import Corpus
from training.data.fingerprints import fingerprint_of

END_OF_TEXT = "<|endoftext|>"
GPT_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
BERT_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def make_tokenizer(
    kind: str, corpus: Corpus, vocab_size: int = 4096, *, context_length: int, masked: bool = False
) -> PreTrainedTokenizerFast:
    """Makes a tokenizer for a corpus, or loads an existing one.

    Args:
        kind: "char": one token for every character of both splits. "bpe": byte-level byte-pair encoding (Sennrich et
            al. 2016; bytes as in GPT-2) with `vocab_size` tokens. Both have one special token, `<|endoftext|>`, and
            decode to exactly the text they encoded. "wordpiece": BERT's (Devlin et al. 2019) with at most `vocab_size`
            tokens: text is lower-cased and loses its accents, words are split at white space and punctuation and then
            into pieces. "bpe" and "wordpiece" are learnt from the training split, and the same text gives the same
            vocabulary. Anything else is the name or folder of an existing tokenizer.
        context_length: the most tokens of a text that the model reads.
        masked: whether the tokenizer is for a masked language model; "wordpiece" always is. The special tokens are then
            BERT's, [PAD] (id 0), [UNK], [CLS], [SEP] and [MASK]; a text is read as [CLS] a [SEP], and a pair as
            [CLS] a [SEP] b [SEP] with token types.

    Raises:
        ValueError: an existing tokenizer does not load, is slow or (masked) lacks one of these tokens; `vocab_size` is
            too small; or the tokenizer would be learnt from a stream.
    """
    if kind not in ("char", "bpe", "wordpiece"):
        return _existing_tokenizer(kind, context_length, masked)
    masked = masked or kind == "wordpiece"
    if corpus.streamed:
        known = "google-bert/bert-base-uncased" if masked else "gpt2"
        raise ValueError(f"a {kind!r} tokenizer would read the whole stream; name an existing one, like {known!r}")
    special = BERT_TOKENS if masked else GPT_TOKENS
    if kind == "char":
        backend = _characters(corpus, masked)
    else:
        backend = (_byte_pairs if kind == "bpe" else _word_pieces)(corpus, vocab_size, _added_tokens(masked))
    if masked:
        joined = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
        )
        # The offsets of a token leave out the space before its word, so that an answer begins with a letter.
        trimmed = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
        backend.post_processor = processors.Sequence([trimmed, joined]) if kind == "bpe" else joined
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special,
        model_max_length=context_length,
        model_input_names=["input_ids", *(["token_type_ids"] if masked else []), "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _existing_tokenizer(name: str, context_length: int, masked: bool) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, clean_up_tokenization_spaces=False)
    except (OSError, ValueError) as error:
        kinds = "neither 'char', 'bpe', 'wordpiece' nor one that loads"
        raise ValueError(f"tokenizer {name!r} is {kinds}: {error}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {name!r} has no fast version; convert it to a tokenizer.json first")
    if masked and (missing := missing_tokens(tokenizer)):
        raise ValueError(f"tokenizer {name!r} has no {', '.join(missing)}: a masked language model needs them")
    tokenizer.model_max_length = context_length
    return tokenizer


def missing_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Lists the tokens of a masked language model that a tokenizer lacks, such as ["mask_token"]."""
    needed = ("pad_token", "cls_token", "sep_token", "mask_token")
    return [name for name in needed if getattr(tokenizer, name) is None]


def _added_tokens(masked: bool) -> list[AddedToken]:
    # In byte-level tokenizers the space before a word is part of it, so [MASK] takes the space along.
    return [
        AddedToken(token, special=True, normalized=False, lstrip=token == "[MASK]")
        for token in (BERT_TOKENS.values() if masked else [END_OF_TEXT])
    ]


def _characters(corpus: Corpus, masked: bool) -> Tokenizer:
    characters = set()
    for split in (corpus.train, corpus.validation):
        for text in split:
            characters.update(text)
    tokens = [*BERT_TOKENS.values(), *sorted(characters)] if masked else [*sorted(characters), END_OF_TEXT]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]" if masked else END_OF_TEXT))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens if len(token) > 1]
    )
    return backend


def _byte_pairs(corpus: Corpus, vocab_size: int, special: list[AddedToken]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(alphabet) + len(special) - 1
    if vocab_size <= least:
        names = ", ".join(token.content for token in special)
        raise ValueError(f"vocab_size must be above {least} (every byte and {names}): {vocab_size}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    return _learn(backend, trainer, corpus)


def _word_pieces(corpus: Corpus, vocab_size: int, special: list[AddedToken]) -> Tokenizer:
    """Learns BERT's tokenizer by byte-pair encoding.

    `WordPieceTrainer` breaks ties by the order of a hash table, which differs from run to run; `BpeTrainer` does not.
    For it, every word gets a mark in front: a piece with the mark begins a word, a piece without it continues one
    ("##...").
    """
    if vocab_size < len(special) + 2:
        raise ValueError(f"vocab_size must leave room for letters beside {len(special)} special tokens: {vocab_size}")
    normalizer, mark = normalizers.BertNormalizer(lowercase=True), "\x00"  # the normaliser removes it from texts
    counts = Counter()
    for text in corpus.train:
        counts.update(text)
    letters = Counter()
    for character, count in counts.items():
        for letter in normalizer.normalize_str(character).split():
            letters.update(dict.fromkeys(letter, count))
    # As in BERT, keep the thousand most frequent letters, each as two pieces. A word with another letter is [UNK].
    kept = sorted(letters, key=lambda letter: (-letters[letter], letter))[: (vocab_size - len(special)) // 2][:1000]
    words = pre_tokenizers.BertPreTokenizer()
    pairs = Tokenizer(models.BPE())
    pairs.normalizer = normalizer
    pairs.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Metaspace(mark, prepend_scheme="always")])
    _learn(pairs, trainers.BpeTrainer(vocab_size=vocab_size + len(letters), show_progress=False), corpus)
    learnt = sorted(pairs.get_vocab().items(), key=lambda item: item[1])
    pieces = [piece[1:] if piece[0] == mark else f"##{piece}" for piece, _ in learnt if {*piece} <= {mark, *kept}]
    tokens = [*BERT_TOKENS.values(), *sorted(kept), *(f"##{letter}" for letter in sorted(kept)), *filter(None, pieces)]
    vocabulary = {token: index for index, token in enumerate(list(dict.fromkeys(tokens))[:vocab_size])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer, backend.decoder = normalizer, words, decoders.WordPiece()
    backend.add_special_tokens(special)
    return backend


def _learn(backend: Tokenizer, trainer, corpus: Corpus) -> Tokenizer:
    backend.train_from_iterator((piece for text in corpus.train for piece in _pieces(text)), trainer)
    return backend


def separator_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id of the token that ends a document: end of text, or BERT's separator."""
    token = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if token is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no eos or sep token to end documents with: set one")
    return token


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Identifies how a tokenizer encodes documents."""
    return fingerprint_of(_encoder(tokenizer).to_str(), separator_id(tokenizer))


def _encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Copies the Rust tokenizer to one that reads everything as plain text, even `<|endoftext|>` spelt out."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str]) -> Iterator[np.ndarray]:
    """Yields the token ids of each document, ended by the separator, or none for an empty document."""
    encoder, separator = _encoder(tokenizer), np.array([separator_id(tokenizer)], np.uint32)
    cut = _pieces if _may_be_cut(encoder) else lambda text: [text]
    pieces = ((number, piece) for number, text in enumerate(documents) for piece in cut(text))

    def encoded() -> Iterator[tuple[int, np.ndarray]]:
        while batch := list(islice(pieces, 256)):
            encodings = encoder.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
            for (number, _), encoding in zip(batch, encodings, strict=True):
                yield number, np.array(encoding.ids, np.uint32)

    for _, parts in groupby(encoded(), key=lambda part: part[0]):
        tokens = np.concatenate([tokens for _, tokens in parts])
        yield np.concatenate([tokens, separator]) if len(tokens) else tokens


def _may_be_cut(encoder: Tokenizer) -> bool:
    """Whether a text that is cut before white space gives the same tokens; not so if texts get a space in front."""
    pieces = ["one", " two", "\nthree"]
    whole, *parts = encoder.encode_batch_fast(["".join(pieces), *pieces], add_special_tokens=False)
    return whole.ids == [token for part in parts for token in part.ids]


# No word of GPT-2's pattern or its successors' continues from a letter or digit into white space.
_BORDER = re.compile(r"(?<=[^\W_])(?=\s)")


def _pieces(text: str, size: int = 4096) -> Iterator[str]:
    """Cuts a long text where no token can span the cut, so that the pieces are encoded in parallel."""
    start = 0
    while len(text) - start > size and (border := _BORDER.search(text, start + size)):
        yield text[start : border.start()]
        start = border.start()
    yield text[start:]
