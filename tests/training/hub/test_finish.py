"""What a run leaves: files that take the place of an earlier end's, and a command that may be repeated by anyone."""

import sys

from training import train_gpt
from training.hub.finish import without_one_time_options

TINY = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2"


def test_a_run_ends_again_where_its_tokenizer_has_a_folder(tokenizer, tmp_path, monkeypatch):
    """Several templates of a chat are files in a folder of their own."""
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "story.txt").write_text("to be or not to be\n" * 200)
    options = {"data": tmp_path / "story.txt", "tokenizer": tmp_path / "tokenizer", "output_dir": tmp_path / "run"}
    options |= {"model": "gpt-small", "config": TINY, "context_length": 8, "max_steps": 2, "warmup_steps": 0}
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *(f"--{name}={value}" for name, value in options.items())])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for _ in range(2):
        train_gpt.main()
        assert (tmp_path / "run" / "eval_results.json").exists()
        assert (tmp_path / "run" / "additional_chat_templates" / "tools.jinja").exists()


def test_a_command_is_given_on_without_what_is_done_once():
    words = "train_gpt.py --max_steps 5 --restart --push_to_hub --hub_model_id me/gpt --hub_private=true --seed 1"
    assert " ".join(without_one_time_options(words.split())) == "train_gpt.py --max_steps 5 --seed 1"
