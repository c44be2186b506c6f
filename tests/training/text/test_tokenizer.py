import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from tests.training.corpora import STORY
from training.data.documents import Corpus, Documents
from training.text import tokenizer as module
from training.text.tokenizer import encode_documents, make_tokenizer, separator_id, tokenizer_fingerprint

REPOSITORY = Path(__file__).parents[3]


MASKED = ["char", "bpe", "wordpiece"]
TIGER = "Tyger Tyger, burning bright: ein Café [MASK] [SEP] x" * 3


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_text_survives_a_tokenizer_and_a_tokenizer_survives_saving(tmp_path, story, kind):
    tokenizer = make_tokenizer(kind, story, vocab_size=400, context_length=64)
    ids = tokenizer.encode(STORY)
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.decode(ids) == loaded.decode(ids) == STORY
    assert loaded.encode(STORY) == ids and loaded.model_max_length == 64
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert {loaded.eos_token_id, loaded.bos_token_id, loaded.pad_token_id, loaded.unk_token_id} == {end}
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    if kind == "char":
        assert len(tokenizer) == len(set(STORY)) + 1 and tokenizer.encode("ß") == [end]
    else:
        assert 256 < len(tokenizer) <= 400 and tokenizer.decode(tokenizer.encode("ß 𝒳")) == "ß 𝒳"


@pytest.mark.parametrize("kind", MASKED)
def test_a_masking_tokenizer_is_the_same_after_saving(tmp_path, story, kind):
    tokenizer = make_tokenizer(kind, story, vocab_size=400, context_length=64, masked=True)
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for texts in ([STORY], [TIGER], ["First line", "second line"]):
        assert dict(loaded(*texts)) == dict(tokenizer(*texts))
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert loaded.model_max_length == 64 and loaded.model_input_names == tokenizer.model_input_names
    special = [loaded.pad_token_id, loaded.unk_token_id, loaded.cls_token_id, loaded.sep_token_id, loaded.mask_token_id]
    assert special == [0, 1, 2, 3, 4] == sorted(loaded.all_special_ids)
    assert separator_id(loaded) == loaded.sep_token_id and loaded.eos_token is None


@pytest.mark.parametrize("kind", MASKED)
def test_a_pair_of_texts_is_told_apart_by_token_types(story, kind):
    tokenizer = make_tokenizer(kind, story, vocab_size=400, context_length=64, masked=True)
    one, other = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("odd", "line"))
    pair = tokenizer("odd", "line")
    assert pair["input_ids"] == [2, *one, 3, *other, 3]
    assert pair["token_type_ids"] == [0] * (len(one) + 2) + [1] * (len(other) + 1)


def test_word_pieces_are_lower_cased_without_accents_and_go_on_with_two_hashes(lines):
    tokenizer = make_tokenizer("wordpiece", lines, vocab_size=120, context_length=64)
    assert tokenizer.tokenize("DOCUMENT: thán") == ["document", "[UNK]", "than"]
    first, *later = tokenizer.tokenize("morethan")
    assert later and all(piece.startswith("##") for piece in later) and not first.startswith("##")
    assert len(tokenizer) <= 120 and tokenizer.decode(tokenizer("no more than that.")["input_ids"][1:-1]) == (
        "no more than that."
    )


def test_word_pieces_stay_within_the_vocabulary_size_however_many_letters_there_are():
    text = "".join(chr(0x4E00 + n) * (3 if n < 500 else 1) for n in range(3000)) + " the the the"
    texts = Documents.of(lambda: [text])
    corpus = Corpus(texts, texts, fingerprint="letters", source="letters")
    tokenizer = make_tokenizer("wordpiece", corpus, vocab_size=1500, context_length=64)
    assert 1400 < len(tokenizer) <= 1500
    assert 1 not in tokenizer(text[:900], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", MASKED)
def test_special_tokens_spelt_out_in_a_document_are_text(story, kind):
    tokenizer = make_tokenizer(kind, story, vocab_size=400, context_length=64, masked=True)
    [tokens] = encode_documents(tokenizer, ["odd [MASK] and [SEP]"])
    assert tokens[-1] == separator_id(tokenizer) and not set(tokens[:-1]) & {0, 2, 3, 4}


@pytest.mark.parametrize("kind", MASKED)
def test_a_masking_tokenizer_serves_the_fill_mask_pipeline_and_the_collator(story, kind):
    tokenizer = make_tokenizer(kind, story, vocab_size=400, context_length=64, masked=True)
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes))
    guesses = pipeline("fill-mask", model=model, tokenizer=tokenizer)("First [MASK] line.", top_k=5)
    assert len(guesses) == 5 and all(guess["sequence"] for guess in guesses)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)
    batch = collate([tokenizer("First line"), tokenizer("Second odd line")])
    scored = batch["labels"] != -100
    assert scored.any() and (batch["labels"][scored] > 4).all() and "token_type_ids" in batch


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_an_entity_begins_at_its_first_letter(story, kind):
    tokenizer = make_tokenizer(kind, story, vocab_size=400, context_length=64, masked=True)
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForTokenClassification(BertConfig(vocab_size=len(tokenizer), **sizes, num_labels=1))
    (entity,) = pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="first")(" odd")
    assert (entity["start"], entity["end"]) == (1, 4)


def test_a_mask_takes_the_space_before_a_word_along(story):
    tokenizer = make_tokenizer("bpe", story, vocab_size=400, context_length=64, masked=True)
    assert tokenizer("First [MASK]")["input_ids"] == tokenizer("First[MASK]")["input_ids"]


@pytest.mark.parametrize("kind", MASKED)
def test_a_word_begins_at_its_first_letter(story, kind):
    tokenizer = make_tokenizer(kind, story, vocab_size=400, context_length=64, masked=True)
    text = "first odd  line"
    for encoding in (tokenizer(text, return_offsets_mapping=True), tokenizer("odd", text, return_offsets_mapping=True)):
        of_text = encoding.sequence_ids().count(1) and 1
        places = [place for place, part in enumerate(encoding.sequence_ids()) if part == of_text]
        spans = [encoding["offset_mapping"][place] for place in places]
        assert {0, 6, 11} <= {start for start, end in spans if end > start}
        assert kind == "char" or all(" " not in text[start:end] for start, end in spans)


def test_the_tokens_of_bytes_are_those_of_bytes_between_the_special_ones(story):
    tokenizer = make_tokenizer("bpe", story, vocab_size=400, context_length=64, masked=True)
    plain = tokenizer(STORY, add_special_tokens=False)["input_ids"]
    assert plain == next(encode_documents(tokenizer, [STORY]))[:-1].tolist()
    assert tokenizer(STORY)["input_ids"] == [2, *plain, 3] and tokenizer.decode(plain) == STORY


def test_the_same_text_gives_the_same_vocabulary(lines, tmp_path):
    program = textwrap.dedent("""
        import sys
        from training.data.documents import read_documents
        from training.text.tokenizer import make_tokenizer
        corpus = read_documents(sys.argv[1])
        for kind in ("bpe", "wordpiece"):
            print(make_tokenizer(kind, corpus, 600, context_length=8).backend_tokenizer.to_str())
    """)
    command = [sys.executable, "-c", program, str(tmp_path / "lines.jsonl")]
    there = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True).stdout.splitlines()
    here = [make_tokenizer(kind, lines, 600, context_length=8) for kind in ("bpe", "wordpiece")]
    assert there == [tokenizer.backend_tokenizer.to_str() for tokenizer in here]


def test_a_tokenizer_serves_the_text_generation_pipeline(story):
    tokenizer = make_tokenizer("char", story, context_length=64)
    config = GPT2Config(vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=8, n_positions=64)
    generate = pipeline("text-generation", model=GPT2LMHeadModel(config), tokenizer=tokenizer)
    generated = generate("First  line.\n", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert generated.startswith("First  line.\n")


def test_unusable_tokenizers_are_refused(story, tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be above 256"):
        make_tokenizer("bpe", story, vocab_size=256, context_length=8)
    with pytest.raises(ValueError, match="neither 'char', 'bpe', 'wordpiece' nor one that loads"):
        make_tokenizer(str(tmp_path / "nowhere"), story, context_length=8)
    with pytest.raises(ValueError, match=r"vocab_size must be above 260 \(every byte and \[PAD\], .*, \[MASK\]\)"):
        make_tokenizer("bpe", story, vocab_size=260, context_length=8, masked=True)
    with pytest.raises(ValueError, match="vocab_size must leave room for letters"):
        make_tokenizer("wordpiece", story, vocab_size=6, context_length=8)
    make_tokenizer("bpe", story, vocab_size=300, context_length=8).save_pretrained(tmp_path / "gpt")
    assert make_tokenizer(str(tmp_path / "gpt"), story, context_length=8).model_max_length == 8
    with pytest.raises(ValueError, match="gpt' has no cls_token, sep_token, mask_token"):
        make_tokenizer(str(tmp_path / "gpt"), story, context_length=8, masked=True)


def test_long_documents_are_cut_into_pieces_without_changing_a_token(story):
    tokenizer = make_tokenizer("bpe", story, vocab_size=500, context_length=64)
    whole = tokenizer.backend_tokenizer
    whole.encode_special_tokens = True
    for content in (STORY * 5, "".join(random.Random(0).choices("ab1_. \n\r\t'sé", k=30_000))):
        pieces = list(module._pieces(content, size=50))
        assert "".join(pieces) == content and len(pieces) > 100
        assert [i for piece in pieces for i in whole.encode(piece).ids] == whole.encode(content).ids


def test_a_tokenizer_that_puts_a_space_before_every_text_gets_long_documents_whole():
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581", -1.0), ("w", -2.0), ("\u2581w", -2.5)], unk_id=0))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>")
    text = "w " * 5000
    [encoded] = encode_documents(tokenizer, [text])
    assert encoded[:-1].tolist() == backend.encode(text, add_special_tokens=False).ids
