"""Whatever is done to a checkpoint, `load_verified` loads it exactly or refuses it in one line, and runs nothing."""

import contextlib
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import time
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from safetensors.torch import load_file, save_file
from transformers.initialization import no_init_weights

import hf_models
from hf_models import load_verified
from hf_models.verify import check_checksums, write_checksums
from tests.families import CASES, family_of
from tests.finished_run import RESULTS
from tests.hub_server import Fault
from training.hub.publish import push

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def canary(tmp_path_factory):
    """A file that exists as soon as code out of a checkpoint has run."""
    return tmp_path_factory.mktemp("canary") / "sang"


@pytest.fixture
def checkpoint(tmp_path, canary):
    """Makes a folder with a family's checkpoint, in one file or in shards, whose code sings when it runs."""

    def make(family="zoo_gpt", shards=False):
        folder = tmp_path / f"{family}-{shards}"
        shutil.copytree(FIXTURES / family, folder)
        for name in ("inputs", "outputs", "generated"):
            (folder / f"{name}.safetensors").unlink(missing_ok=True)
        if shards:
            hf_models_class(folder).from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
            (folder / WEIGHTS).unlink()
        code = json.loads((folder / "config.json").read_text())["auto_map"]["AutoConfig"].split(".")[0]
        for path in [folder / f"{code}.py", *folder.glob("*.py")]:
            path.write_text(f"open({str(canary)!r}, 'w')\n")
        (folder / "README.md").write_text("A card.\n")
        write_checksums(folder)
        return folder

    return make


@pytest.fixture
def quick():
    """Leaves out the initial weights, which take half of the time and are not used."""
    with no_init_weights():
        yield


def hf_models_class(folder):
    return getattr(hf_models, json.loads((folder / "config.json").read_text())["architectures"][0])


class Song:
    """Sings when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def assert_same_model(model, expected):
    assert type(model) is type(expected)
    state, expected_state = model.state_dict(), expected.state_dict()
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], expected_state[name]) for name in state)


def refusal(folder, **options):
    """The words of the refusal, None where there is none; any other error fails the test."""
    try:
        load_verified(folder, **options)
    except ValueError as error:
        assert "\n" not in str(error) and str(error).isprintable(), str(error)
        assert len(str(error)) < 1000
        return str(error)


# What is loaded


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_class_loads_as_from_pretrained_does(case, tmp_path):
    family = family_of(case.model_class)
    saved = case.model_class(case.model_class.config_class(**{**family.sizes, **case.fields}))
    saved.save_pretrained(tmp_path)
    write_checksums(tmp_path)
    model = load_verified(tmp_path)
    assert_same_model(model, saved)
    expected = case.model_class.from_pretrained(tmp_path)
    assert [one.requires_grad for one in model.parameters()] == [one.requires_grad for one in expected.parameters()]
    assert model.config.to_dict() == expected.config.to_dict()
    assert not model.training and model.name_or_path == str(tmp_path)
    if model.can_generate():
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()


def test_shards_load_like_one_file(checkpoint):
    folder = checkpoint(shards=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_same_model(load_verified(folder), hf_models_class(folder).from_pretrained(FIXTURES / "zoo_gpt"))


def test_tied_weights_are_still_one_tensor(checkpoint):
    model = load_verified(checkpoint())
    assert model.lm_head.weight is model.transformer.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype_or_take_the_one_asked_for(checkpoint, tmp_path, dtype):
    load_verified(checkpoint(), dtype=dtype).save_pretrained(tmp_path / "other")
    write_checksums(tmp_path / "other")
    assert load_verified(tmp_path / "other").dtype == dtype
    assert load_verified(tmp_path / "other", dtype=torch.float32).dtype == torch.float32


def test_the_model_keeps_working_when_the_files_are_gone(checkpoint):
    folder = checkpoint()
    model = load_verified(folder)
    expected = hf_models_class(folder).from_pretrained(FIXTURES / "zoo_gpt")
    (folder / WEIGHTS).write_bytes(b"\0" * (folder / WEIGHTS).stat().st_size)
    assert_same_model(model, expected)


# The sums


def test_sums_are_of_what_loading_reads_and_sha256sum_checks_them(checkpoint):
    folder = checkpoint()
    for name in ("eval_results.json", "run.json", "metrics.jsonl", "curves.png", ".hidden.json"):
        (folder / name).write_text("{}")
    assert write_checksums(folder) == folder / "SHA256SUMS"
    assert check_checksums(folder) == ["config.json", "generation_config.json", "gpt.py", WEIGHTS]
    assert (folder / "SHA256SUMS").read_text().count("\n") == 4
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)


def test_cards_pictures_and_results_may_be_edited(checkpoint):
    folder = checkpoint()
    for name in ("README.md", "eval_results.json", "LICENSE.txt"):
        (folder / name).write_text("edited")
    load_verified(folder)


def test_pinned_sums_pin_every_file(checkpoint):
    folder = checkpoint()
    pin = hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest()
    load_verified(folder, sha256=pin)
    (folder / "gpt.py").write_text("another")
    write_checksums(folder)
    assert refusal(folder) is None
    assert "that you asked for" in refusal(folder, sha256=pin)
    assert "64 digits" in refusal(folder, sha256="abc")


# What is refused, with sums that say it is fine


def edit_json(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_config(**values):
    return lambda folder, canary: edit_json(folder, "config.json", **values)


def read_header(path):
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def write_header(path, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def edit_header(change):
    def edit(folder, canary):
        header, data = read_header(folder / WEIGHTS)
        data = change(header, data) or data
        write_header(folder / WEIGHTS, header, data)

    return edit


def edit_weights(change):
    def edit(folder, canary):
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def replace_first(**values):
    def change(header, data):
        name = min((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        header[name].update(values)

    return edit_header(change)


def plant(name, data=None):
    def edit(folder, canary):
        (folder / name).write_bytes(pickle.dumps(Song(canary)) if data is None else data)

    return edit


def link(name, target):
    def edit(folder, canary):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return edit


def leave_out(*names):
    def edit(folder, canary):
        for name in names:
            (folder / name).unlink()

    return edit


def replace_with_fifo(folder, canary):
    (folder / "SHA256SUMS").unlink()
    os.mkfifo(folder / "SHA256SUMS")


def overlap(header, data):
    first, second = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])[:2]
    begin, end = header[second]["data_offsets"]
    header[second]["data_offsets"] = [begin - 4, end - 4]


def add_hole(header, data):
    last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    begin, end = header[last]["data_offsets"]
    header[last]["data_offsets"] = [begin + 4, end + 4]
    return data + bytes(4)


def twice(folder, canary):
    header, data = read_header(folder / WEIGHTS)
    name = next(name for name in header if name != "__metadata__")
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    write_header(folder / WEIGHTS, text.encode(), data)


NORM = "transformer.norm.weight"
REFUSED = {
    "no sums": (leave_out("SHA256SUMS"), "write_checksums"),
    "sums are a pipe": (replace_with_fifo, "SHA256SUMS"),
    "no config": (leave_out("config.json"), "config.json"),
    "no weights": (leave_out(WEIGHTS), WEIGHTS),
    "only a pickle": (lambda f, c: (leave_out(WEIGHTS)(f, c), plant("pytorch_model.bin")(f, c)), "pytorch_model.bin"),
    "a pickle beside": (plant("training_args.bin"), "training_args.bin"),
    "a pickle in capitals": (plant("WEIGHTS.PT"), "WEIGHTS.PT"),
    "a pickle for weights": (plant(WEIGHTS), WEIGHTS),
    "a pickle for a config": (plant("config.json"), "config.json"),
    "a name of two lines": (plant("a\nb.pkl", b""), "pkl"),
    "weights twice": (lambda f, c: shutil.copy(FIXTURES / "zoo_gpt" / WEIGHTS, f / "model-2.bin"), "model-2.bin"),
    "a link out": (link("config.json", "/etc/hostname"), "link out of"),
    "a link to a device": (link(WEIGHTS, "/dev/zero"), "link out of"),
    "a link up": (link("tokenizer.json", "../x.json"), "link out of"),
    "a link to itself": (link("config.json", "config.json"), "config.json"),
    "a stock model": (edit_config(model_type="gpt2"), "from_pretrained"),
    "no model_type": (edit_config(model_type=None), "model_type"),
    "another family's class": (edit_config(architectures=["ZooBertModel"]), "architectures"),
    "a class that is no model": (edit_config(architectures=["ZooGPTConfig"]), "architectures"),
    "a class of elsewhere": (edit_config(architectures=["os.system"]), "architectures"),
    "another class": (edit_config(architectures=["ZooGPTModel"]), "lack"),
    "a kernel to fetch": (edit_config(attn_implementation="me/kernel"), "attn_implementation"),
    "a kernel, privately": (edit_config(_attn_implementation="me/kernel"), "_attn_implementation"),
    "code of another repository": (edit_config(auto_map={"AutoModel": "me/x--gpt.Evil"}), "another repository"),
    "quantisation": (edit_config(quantization_config={"quant_method": "x"}), "quantization_config"),
    "a method's name": (edit_config(save_pretrained="x"), "save_pretrained"),
    "a dtype that is a function": (edit_config(dtype="load"), "dtype"),
    "another dtype": (edit_config(dtype="float16"), "float16"),
    "a field of another kind": (edit_config(hidden_size="24"), "hidden_size"),
    "sizes that do not fit": (edit_config(hidden_size=25, head_dim=6), "[32, 25]"),
    "10^12 parameters": (edit_config(vocab_size=10**12 // 24), "embed_tokens"),
    "more than can be counted": (edit_config(vocab_size=10**30), "config.json"),
    "an endless number": (plant("config.json", b'{"vocab_size": ' + b"9" * 5000 + b"}"), "config.json"),
    "10^9 layers": (edit_config(num_hidden_layers=10**9), "num_hidden_layers"),
    "deep JSON": (plant("config.json", b'{"a":' * 10**5), "recursion"),
    "less deep JSON": (plant("config.json", b'{"a":' * 800 + b"1" + b"}" * 800), "levels"),
    "a deep list in JSON": (edit_config(class_weights=[[[[[[[[[1.0]]]]]]]]]), "levels"),
    "large JSON": (plant("config.json", b" " * 10**7 + b"{}"), "larger than"),
    "a list": (plant("config.json", b"[]"), "object"),
    "NaN in JSON": (plant("config.json", b'{"rope_theta": NaN}'), "finite"),
    "infinity in JSON": (plant("config.json", b'{"rope_theta": 1e999}'), "finite"),
    "a name twice in JSON": (plant("config.json", b'{"a": 1, "a": 2}'), "twice"),
    "other than UTF-8": (plant("config.json", '{"a": 1}'.encode("utf-16")), "UTF-8"),
    "unknown generation": (lambda f, c: edit_json(f, "generation_config.json", custom=1), "custom"),
    "wrong generation": (lambda f, c: edit_json(f, "generation_config.json", max_new_tokens=-1), "max_new_tokens"),
    "an empty file": (plant(WEIGHTS, b""), "safetensors"),
    "a header longer than the file": (plant(WEIGHTS, (2**40).to_bytes(8, "little") + b"{}"), "header"),
    "an oversized header": (
        lambda f, c: write_header(f / WEIGHTS, b" " * (10**7 + 1), b""),
        "header",
    ),
    "bytes behind": (edit_header(lambda header, data: data + b"x"), "describes"),
    "bytes missing": (edit_header(lambda header, data: data[:-1]), "describes"),
    "overlapping tensors": (edit_header(overlap), "begins at"),
    "a hole": (edit_header(add_hole), "begins at"),
    "a tensor twice": (twice, "twice"),
    "a dtype that does not fit": (replace_first(dtype="F64"), "fit"),
    "a dtype of another size": (replace_first(dtype="I32"), "dtype"),
    "a shape that does not fit": (replace_first(shape=[1]), "fit"),
    "a shape below zero": (replace_first(shape=[-24, -64]), "fit"),
    "a shape of another kind": (replace_first(shape=[24, True]), "fit"),
    "a huge shape": (replace_first(shape=[10**300] * 1000), "fit"),
    "offsets backwards": (replace_first(data_offsets=[96, 0]), "fit"),
    "metadata of another kind": (
        edit_header(lambda header, data: header.update(__metadata__={"a": {}})),
        "__metadata__",
    ),
    "more in a header": (replace_first(more=1), "fit"),
    "a tensor missing": (edit_weights(lambda weights: weights.pop(NORM)), NORM),
    "a tensor too many": (edit_weights(lambda weights: weights.update(more=torch.ones(1))), "more"),
    "a tied tensor twice": (edit_weights(lambda w: w.update({"lm_head.weight": torch.ones(64, 24)})), "lm_head"),
    "a transposed tensor": (edit_weights(lambda w: w.update({NORM: w[NORM][None]})), NORM),
    "two dtypes": (edit_weights(lambda w: w.update({NORM: w[NORM].half()})), "float16"),
    "not a number": (edit_weights(lambda w: w[NORM].fill_(torch.nan)), "finite"),
    "infinite": (edit_weights(lambda w: w[NORM].fill_(-torch.inf)), "finite"),
}


@pytest.mark.parametrize("edit, words", REFUSED.values(), ids=REFUSED.keys())
def test_refused_even_where_the_sums_are_right(edit, words, checkpoint, canary):
    folder = checkpoint()
    edit(folder, canary)
    if edit is not replace_with_fifo and (folder / "SHA256SUMS").exists():
        rewrite_sums(folder)
    words_of_refusal = refusal(folder)
    assert words_of_refusal and words in words_of_refusal, words_of_refusal
    assert not canary.exists()


def rewrite_sums(folder):
    """As somebody would who wants the folder to pass."""
    lines = []
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".py", ".txt", ".jinja"):
            data = path.read_bytes() if path.is_file() and path.resolve().parent == folder.resolve() else b""
            lines.append(f"{hashlib.sha256(data).hexdigest()}  {path.name}\n")
    (folder / "SHA256SUMS").write_text("".join(lines))


def shard(change):
    def edit(folder, canary):
        index = json.loads((folder / INDEX).read_text())
        change(folder, index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return edit


SECOND = "model-00002-of-00003.safetensors"
REFUSED_SHARDS = {
    "up and out": (shard(lambda folder, names: names.update({NORM: "../model.safetensors"})), "../model"),
    "absolute": (shard(lambda folder, names: names.update({NORM: "/etc/passwd"})), "/etc/passwd"),
    "not a name": (shard(lambda folder, names: names.update({NORM: 7})), "7"),
    "a shard missing": (leave_out(SECOND), SECOND),
    "a shard too many": (
        lambda f, c: shutil.copy(f / SECOND, f / "model-00004-of-00003.safetensors"),
        "model-00004-of-00003",
    ),
    "a tensor in two shards": (
        lambda f, c: save_file(load_file(f / SECOND) | {NORM: torch.ones(24)}, f / SECOND, metadata={"format": "pt"}),
        NORM,
    ),
    "a tensor of another shard": (shard(lambda folder, names: names.update({NORM: min(names.values())})), NORM),
    "a tensor not in the index": (shard(lambda folder, names: names.pop(NORM)), NORM),
    "one file beside": (lambda f, c: shutil.copy(FIXTURES / "zoo_gpt" / WEIGHTS, f), "both"),
    "an empty index": (shard(lambda folder, names: names.clear()), "index"),
}


@pytest.mark.parametrize("edit, words", REFUSED_SHARDS.values(), ids=REFUSED_SHARDS.keys())
def test_refused_shards(edit, words, checkpoint, canary):
    folder = checkpoint(shards=True)
    assert len(list(folder.glob("model-*-of-00003.safetensors"))) == 3
    edit(folder, canary)
    rewrite_sums(folder)
    words_of_refusal = refusal(folder)
    assert words_of_refusal and words in words_of_refusal, words_of_refusal


@pytest.mark.parametrize("family", FAMILIES)
def test_no_number_in_a_config_takes_memory_or_time(family, checkpoint, quick):
    folder = checkpoint(family)
    config, expected = json.loads((folder / "config.json").read_text()), load_verified(folder)
    for name, value in config.items():
        for wrong in (
            (10**12, -1, 0) if type(value) is int else ([10**12], [10**9] * 1000) if name != "id2label" else ()
        ):
            (folder / "config.json").write_text(json.dumps({**config, name: wrong}))
            rewrite_sums(folder)
            began = time.process_time()
            with contextlib.suppress(ValueError):
                assert_same_model(load_verified(folder), expected)  # a token's id, say, changes no weight
            assert time.process_time() - began < 2, (name, wrong)


def test_links_within_the_folder_are_fine(checkpoint):
    folder = checkpoint()
    os.rename(folder / WEIGHTS, folder / "weights")
    (folder / WEIGHTS).symlink_to("weights")
    load_verified(folder)


def test_a_file_that_nobody_vouches_for_is_refused(checkpoint):
    for name in ("modeling.py", "tokenizer_config.json", "adapter_model.safetensors", "chat_template.jinja"):
        folder = checkpoint()
        (folder / name).write_text("{}")
        assert name in refusal(folder)
        shutil.rmtree(folder)


# From the Hub


def publish(folder, repo="me/model"):
    HfApi().create_repo(repo, exist_ok=True)
    return HfApi().upload_folder(repo_id=repo, folder_path=folder).oid


def fetched(hub) -> set[str]:
    """The names of the files that somebody asked for."""
    paths = (unquote(request.path).partition("/resolve/")[2] for request in hub.requests)
    return {path.partition("/")[2] for path in paths if path}


def test_a_repository_loads_at_any_of_its_revisions(hub, checkpoint):
    folder = checkpoint()
    first = publish(folder)
    edit_weights(lambda weights: weights[NORM].fill_(2.0))(folder, None)
    write_checksums(folder)
    publish(folder)
    assert load_verified("me/model").transformer.norm.weight[0] == 2.0
    assert_same_model(
        load_verified("me/model", revision=first), hf_models_class(folder).from_pretrained(FIXTURES / "zoo_gpt")
    )
    assert "revision" in refusal(folder, revision=first)


def test_what_a_push_published_loads(hub, checkpoint):
    folder = checkpoint()
    (folder / "eval_results.json").write_text(json.dumps(RESULTS))
    push(folder, "me/pushed")
    assert_same_model(load_verified("me/pushed"), load_verified(folder))


def test_what_a_person_keeps_in_a_repository_is_not_fetched_and_refuses_nothing(hub, checkpoint):
    folder = checkpoint()
    (folder / "[a-z]*.json").write_text("{}")
    write_checksums(folder)
    (folder / "eval_results.json").write_text(json.dumps(RESULTS))
    push(folder, "me/kept")
    theirs = ["app.py", "my.json", "model-00001-of-00002.safetensors", "theirs.txt", "demo/config.json"]
    operations = [CommitOperationAdd(name, b"theirs") for name in theirs]
    HfApi().create_commit("me/kept", operations, commit_message="Edited")
    hub.requests.clear()
    assert_same_model(load_verified("me/kept"), load_verified(folder))
    assert fetched(hub) == {"SHA256SUMS", *check_checksums(folder)}
    snapshot_download("me/kept")  # lays the others beside them
    assert_same_model(load_verified("me/kept"), load_verified(folder))


def test_the_pin_is_checked_before_anything_else_is_fetched(hub, checkpoint):
    folder = checkpoint()
    publish(folder)
    pin = hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest()
    assert "asked for" in refusal("me/model", sha256="0" * 64)
    assert fetched(hub) == {"SHA256SUMS"}
    assert refusal("me/model", sha256=pin) is None


@pytest.mark.parametrize("listed", ["pytorch_model.bin", "run.json", "gone.json"])
def test_sums_of_a_repository_fetch_only_what_loading_reads(hub, checkpoint, listed):
    folder = checkpoint()
    with (folder / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  {listed}\n")
    if listed != "gone.json":
        (folder / listed).write_text("{}")
    publish(folder)
    assert f"lists {listed}" in refusal("me/model")
    assert listed not in fetched(hub)


def test_a_repository_without_sums_is_refused(hub, checkpoint):
    folder = checkpoint()
    (folder / "SHA256SUMS").unlink()
    publish(folder)
    assert "me/model has no SHA256SUMS: ask its owner" in refusal("me/model")


def test_a_damaged_download_is_refused_until_it_is_fetched_again(hub, checkpoint):
    publish(checkpoint(), "me/damaged")
    hub.faults.append(Fault("corrupt", method="GET", path="/storage/"))  # the weights are there
    for _ in range(2):  # the library kept the file: it noticed nothing
        assert "hf download --force-download" in refusal("me/damaged")
    snapshot_download("me/damaged", force_download=True)
    assert refusal("me/damaged") is None


def test_pickles_in_a_repository_are_not_even_fetched(hub, checkpoint, canary):
    folder = checkpoint()
    plant("pytorch_model.bin")(folder, canary)
    publish(folder, "me/pickled")
    load_verified("me/pickled")
    assert not any("/resolve/" in request.path and ".bin" in request.path for request in hub.requests)
    assert not canary.exists()


# Whatever is done


def some_file(rng, folder):
    """SHA256SUMS, README.md and what they do not cover aside."""
    return rng.choice(sorted(path for path in folder.iterdir() if path.name not in ("SHA256SUMS", "README.md")))


def rewrite_bytes(change):
    def mutate(rng, folder, canary):
        path = some_file(rng, folder)
        data = bytearray(path.read_bytes())
        change(rng, data)
        path.write_bytes(data)

    return mutate


def flip_bits(rng, data):
    for _ in range(rng.choice((1, 1, 1, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_a_bit_in_front(rng, data):
    data[rng.randrange(min(len(data), 200))] ^= 1 << rng.randrange(8)


def cut_off(rng, data):
    del data[rng.randrange(len(data)) :]


def cut_out(rng, data):
    start = rng.randrange(len(data))
    del data[start : start + rng.randint(1, 64)]


def append(rng, data):
    data += rng.randbytes(rng.randint(1, 64))


def move_a_block(rng, data):
    here, there = (rng.randrange(len(data)) for _ in range(2))
    block = data[here : here + 64]
    del data[here : here + 64]
    data[there:there] = block


def blank_a_block(rng, data):
    start = rng.randrange(len(data))
    data[start : start + 512] = bytes(len(data[start : start + 512]))


HOSTILE = [None, True, -1, 0, 1, 2.5, 10**6, 10**12, 2**63, 10**400, 1e-300, "", "x", "../x", "me/kernel", "a--b.C"]
HOSTILE += [[], [0], [10**12], ["x"] * 5, {}, {"0": "x"}, {"model_type": "zoo_vit"}, {"model_type": "timm_backbone"}]
FIELDS = ["attn_implementation", "quantization_config", "transformers_weights", "num_labels", "n_embd", "forward"]


def some_place(rng, value):
    """A dict or list somewhere in JSON, and one of its keys."""
    while True:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if not isinstance(value[key], dict | list) or not value[key] or rng.random() < 0.3:
            return value, key
        value = value[key]


def change_json(rng, value):
    inner, key = some_place(rng, value)
    match rng.randrange(4):
        case 0:
            del inner[key]
        case 1 if isinstance(inner, dict):
            inner[rng.choice([*FIELDS, str(key) + "x"])] = inner.pop(key) if rng.random() < 0.3 else rng.choice(HOSTILE)
        case 2:
            other, other_key = some_place(rng, value)
            inner[key], other[other_key] = other[other_key], json.loads(json.dumps(inner[key]))
        case _:
            inner[key] = rng.choice(HOSTILE)


def change_config(rng, folder, canary):
    path = rng.choice(sorted(folder.glob("*.json")))
    value = json.loads(path.read_text())
    change_json(rng, value)
    path.write_text(json.dumps(value))


def change_header(rng, folder, canary):
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    header, data = read_header(path)
    if rng.random() < 0.2:
        length = rng.choice((0, 1, 2**16, 2**31, 2**63, 2**64 - 1))
        return write_header(path, header, data, length)
    change_json(rng, header)
    write_header(path, header, data)


def exchange_files(rng, folder, canary):
    """A file of another family, or another file of this checkpoint, in a file's place."""
    path = some_file(rng, folder)
    other = FIXTURES / rng.choice([name for name in FAMILIES if name not in folder.name]) / path.name
    shutil.copy(other if other.exists() else some_file(rng, folder), folder / "other")
    os.replace(folder / "other", path)


def exchange_the_config(rng, folder, canary):
    shutil.copy(FIXTURES / rng.choice([name for name in FAMILIES if name not in folder.name]) / "config.json", folder)


def remove_a_file(rng, folder, canary):
    some_file(rng, folder).unlink()


def make_a_link(rng, folder, canary):
    path = some_file(rng, folder)
    path.rename(folder.parent / path.name)
    path.symlink_to(rng.choice((Path("..") / path.name, folder.parent / path.name, "/dev/zero", path.name, "missing")))


def make_something_else(rng, folder, canary):
    path = some_file(rng, folder)
    path.unlink()
    rng.choice((os.mkfifo, os.mkdir))(path)


def plant_a_pickle(rng, folder, canary):
    name = rng.choice(("pytorch_model.bin", "model.pt", "x.PKL", "training_args.bin", "a.ckpt", "tf_model.h5", WEIGHTS))
    plant(name)(folder, canary)


def plant_code(rng, folder, canary):
    song = f"open({str(canary)!r}, 'w')\n".encode()
    name = rng.choice(("custom_generate.py", "__init__.py", "torch.py", "sitecustomize.py", "conftest.py"))
    plant(name, song)(folder, canary)
    code = rng.choice((f"{name[:-3]}.ZooGPTConfig", "me/evil--x.Y"))
    edit_json(folder, "config.json", auto_map={"AutoConfig": code, "AutoModel": code}, custom_generate=name)


def plant_weights(rng, folder, canary):
    name = rng.choice((WEIGHTS, INDEX, "model-00002-of-00002.safetensors", "adapter_model.safetensors"))
    other = FIXTURES / rng.choice([name for name in FAMILIES if name not in folder.name])
    shutil.copy(other / ("config.json" if name == INDEX else WEIGHTS), folder / name)


BYTES = [flip_bits, flip_a_bit_in_front, cut_off, cut_out, append, move_a_block, blank_a_block]
MUTATIONS = [rewrite_bytes(change) for change in BYTES] + [
    *(change_config, change_config, change_header, change_header),
    *(exchange_files, exchange_the_config, remove_a_file, make_a_link, make_something_else),
    *(plant_a_pickle, plant_code, plant_weights),
]
NUM_MUTANTS = 171  # of a checkpoint; there are six, and 19 mutations


def contents(folder):
    return {
        path.name: path.read_bytes() if path.is_file() and not path.is_symlink() else None for path in folder.iterdir()
    }


@pytest.mark.parametrize("family, shards", [(name, False) for name in FAMILIES] + [("zoo_gpt", True)])
def test_no_corrupted_checkpoint_loads_or_runs_code(family, shards, checkpoint, tmp_path, canary, quick):
    """With the sums as published, or pinned, none loads. Where they were rewritten to fit, what loads are the weights
    that are in the files, as the safetensors library reads them, in the model as it was."""
    good = checkpoint(family, shards)
    pin = hashlib.sha256((good / "SHA256SUMS").read_bytes()).hexdigest()
    published, expected = contents(good), load_verified(good)
    for seed in range(NUM_MUTANTS):
        rng, mutate, bad = random.Random(f"{family} {seed}"), MUTATIONS[seed % len(MUTATIONS)], tmp_path / str(seed)
        shutil.copytree(good, bad)
        mutate(rng, bad, canary)
        if contents(bad) != published:
            assert refusal(bad), (seed, mutate)
        rewrite_sums(bad)
        if contents(bad) != published:
            assert refusal(bad, sha256=pin), (seed, mutate)
        try:
            model = load_verified(bad)
        except ValueError:
            continue
        finally:
            assert not canary.exists(), (seed, mutate)
        weights = {name: tensor for path in bad.glob("model*.safetensors") for name, tensor in load_file(path).items()}
        state = model.state_dict()
        assert type(model) is type(expected) and state.keys() == expected.state_dict().keys(), (seed, mutate)
        assert all(torch.equal(state[name], tensor) for name, tensor in weights.items()), (seed, mutate)
