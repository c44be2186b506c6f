import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from training.publish import push, snippet, write_card

RESULTS = {
    "model_name": "gpt-embedded",
    "family": "zoo_gpt",
    "parameters": 1234567,
    "snippet": snippet("runs/gpt-embedded"),
    "command": "accelerate launch training/train_gpt.py --max_steps 5",
    "recipe": "training/recipes/quickstart.yaml",
    "data": {"source": "embedded", "fingerprint": "0a1b2c", "licence": "PSF-2.0"},
    "hardware": "2 CPU cores",
    "wall_time_seconds": 900.0,
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "eval_loss": 1.59134567,
    "eval_bits_per_byte": 2.29,
    "sample": "A $sample with\n```\nits own fence\n```\n\n\nand ## no heading",
}


@pytest.fixture
def run(tmp_path):
    """A finished run, with what belongs on the Hub and what does not."""
    for name in ("config.json", "model.safetensors", "gpt.py", "curves.png", "metrics.jsonl", ".lock", "train.log"):
        (tmp_path / name).write_text(name)
    for name in ("checkpoints/step-000005/optimizer.safetensors", "wandb/config.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "eval_results.json").write_text(json.dumps(RESULTS))
    return tmp_path


def card_of(run, **changes) -> str:
    results = {key: value for key, value in {**RESULTS, **changes}.items() if value is not None}
    (run / "eval_results.json").write_text(json.dumps(results))
    return write_card(run).read_text()


def test_the_card_shows_what_was_measured(run):
    card = card_of(run)
    for text in (
        "# gpt-embedded",
        "1,234,567 parameters",
        "| loss | 1.5913 |",
        "| bits per byte | 2.29 |",
        f"```bash\n{RESULTS['command']}\n```",
        f"```python\n{RESULTS['snippet']}\n```",
        f"````text\n{RESULTS['sample']}\n````",
        "- Recipe: `training/recipes/quickstart.yaml`",
        "- Fingerprint of the data: `0a1b2c`",
        "- Licence of the data: PSF-2.0",
        "- Time: 0.25 hours",
        "- Versions: torch 2.13.0, transformers 5.23.0",
        "![Loss during training](curves.png)",
        "## Limits and biases",
        "@software{hf_models",
    ):
        assert text in card


def test_the_header_is_what_the_hub_reads(run):
    header = ModelCard(card_of(run)).data
    assert (header.library_name, header.pipeline_tag, header.license) == (
        "transformers",
        "text-generation",
        "apache-2.0",
    )
    assert header.tags == ["hf_models", "zoo_gpt"]
    assert header.model_name == "gpt-embedded"
    measured = {result.metric_type: result.metric_value for result in header.eval_results}
    assert measured == {"loss": 1.59134567, "bits_per_byte": 2.29}


def test_what_was_not_measured_leaves_no_line_and_no_empty_section(run):
    (run / "curves.png").unlink()
    absent = dict.fromkeys(("eval_loss", "eval_bits_per_byte", "sample", "wall_time_seconds", "parameters", "data"))
    card = card_of(run, **absent, eval_perplexity=float("inf"))
    for text in (
        "## Results",
        "## A sample",
        "Time:",
        "parameters",
        "Data:",
        "model-index",
        "inf",
        "None",
        "$",
        ".png",
    ):
        assert text not in card
    assert "\n\n\n" not in card
    assert "- Hardware: 2 CPU cores" in card


def test_a_persons_words_stay_when_the_card_is_generated_again(run):
    card = card_of(run)
    begin, end = card.index("*To be written"), card.index("<!-- end by hand -->")
    (run / "README.md").write_text(card[:begin] + "Mine, with 100 $ and \\1.\n" + card[end:])
    card = card_of(run, eval_loss=1.25)
    assert "Mine, with 100 $ and \\1.\n" in card and "*To be written" not in card
    assert "| loss | 1.25 |" in card


def test_a_readme_of_another_hand_is_not_touched(run):
    (run / "README.md").write_text("# My own words\n")
    assert card_of(run) == "# My own words\n"


def test_a_run_without_results_has_no_card(tmp_path):
    with pytest.raises(ValueError, match=r"eval_results\.json does not exist"):
        write_card(tmp_path)
    (tmp_path / "eval_results.json").write_text("{")
    with pytest.raises(ValueError, match=r"eval_results\.json is not JSON"):
        write_card(tmp_path)


def test_the_snippet_is_three_lines_that_load_and_use_the_checkpoint(tmp_path):
    lines = snippet('runs/a "quoted" näme').split("\n")
    assert len(lines) == 3
    assert lines[1] == (
        r'generate = pipeline("text-generation", model="runs/a \"quoted\" näme", trust_remote_code=True)'
    )
    with pytest.raises(ValueError, match="no snippet for task 'cooking'"):
        snippet("runs/a", task="cooking")


def test_the_snippet_of_a_detector_prints_a_line_for_each_object(tmp_path):
    load, use = snippet(tmp_path, "object-detection").splitlines()[1:]
    assert load.startswith('detect = pipeline("object-detection", model=')
    assert use == f'print(*detect("{tmp_path}/example.png"), sep="\\n")'


def test_the_snippet_runs(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocabulary = {character: number for number, character in enumerate("Te hx")}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "?": len(vocabulary)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(tmp_path)
    GPT2LMHeadModel(GPT2Config(vocab_size=6, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", snippet(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("T")


@pytest.fixture
def hub(monkeypatch):
    """A Hub on loopback that takes every file and keeps the requests; `refuse` is a status for all answers."""
    requests, refuse = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            requests.append((self.path, body))
            answer = {"url": f"{endpoint}/me/gpt", "commitUrl": f"{endpoint}/me/gpt/commit/1", "commitOid": "1"}
            if "preupload" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            self.answer(answer)

        def do_GET(self):
            self.answer({"id": "me/gpt", "sha": "0", "siblings": []})

        def answer(self, content):
            body = json.dumps({"error": "no\nright to"} if refuse else content).encode()
            self.send_response(refuse[0] if refuse else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *ignored):
            pass

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    endpoint = f"http://localhost:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    yield endpoint, requests, refuse
    server.shutdown()


def test_a_push_is_one_commit_of_the_checkpoint_without_the_runs_state(run, hub):
    endpoint, requests, _ = hub
    assert push(run, "me/gpt") == f"{endpoint}/me/gpt"
    commits = [body for path, body in requests if "/commit/" in path]
    assert len(commits) == 1
    sent = [json.loads(line) for line in commits[0].splitlines()]
    names = {line["value"]["path"] for line in sent if line["key"] == "file"}
    kept = {
        "README.md",
        "config.json",
        "model.safetensors",
        "gpt.py",
        "eval_results.json",
        "metrics.jsonl",
        "curves.png",
    }
    assert names == kept
    assert 'model="me/gpt"' in (run / "README.md").read_text()


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_refused_push_is_one_line_with_the_repository_and_without_the_token(run, hub, status):
    hub[2].append(status)
    with pytest.raises(ValueError) as caught:
        push(run, "me/gpt")
    message = str(caught.value)
    assert "to me/gpt: " in message and "\n" not in message and "canary" not in message


def test_an_unreachable_hub_a_bad_name_and_an_unfinished_run_are_named(run, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://localhost:9")
    with pytest.raises(ValueError, match="to me/gpt: "):
        push(run, "me/gpt")
    with pytest.raises(ValueError, match="to me/not/a/name: "):
        push(run, "me/not/a/name")
    (run / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        push(run, "me/gpt")
