from transformers import AutoTokenizer

from training.tasks.models import end_texts


def test_a_gpts_texts_end_with_the_token_that_is_asked(tokenizer):
    ended = end_texts(tokenizer)
    end = tokenizer.eos_token_id
    one, other = tokenizer("ab")["input_ids"], tokenizer("c")["input_ids"]
    assert ended("ab")["input_ids"] == [*one, end]
    assert ended("ab", "c")["input_ids"] == [*one, end, *other, end]
    assert ended("")["input_ids"] == [end]
    assert ended("ab" * 50, truncation=True, max_length=10)["input_ids"][-1] == end
    assert end_texts(ended)("ab")["input_ids"] == [*one, end]  # not twice
    assert "token_type_ids" not in ended("ab")


def test_the_end_of_text_is_kept_when_the_tokenizer_is_saved(tokenizer, tmp_path):
    end_texts(tokenizer).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("ab", "c")["input_ids"] == end_texts(tokenizer)("ab", "c")["input_ids"]
