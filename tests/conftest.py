"""What the tests share: a private Hugging Face home and Hub, one seed, tiny models of every kind, a tokenizer."""

import os
import tempfile

from tests.hub_server import HubServer, hold_port

# Read when the libraries are imported, so they are set before. The Hub is an address on loopback, where nobody
# answers but in the tests that ask for `hub`; its token is the user's of that Hub.
_hf_home = tempfile.TemporaryDirectory(prefix="hf_models_tests_")
_hub_port, _hold = hold_port()
os.environ["HF_HOME"] = _hf_home.name
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{_hub_port}"
os.environ["NO_PROXY"] = "127.0.0.1,localhost"
os.environ["HF_HUB_DISABLE_XET"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors  # noqa: E402

from hf_models import ZooBertForMaskedLM, ZooGPTForCausalLM, ZooViTForImageClassification  # noqa: E402
from hf_models.base import TransformerConfig  # noqa: E402
from tests.families import GPT_OPTIONS, TINY_MAE, TINY_TEXT, TINY_VIT, family_of  # noqa: E402


@pytest.fixture(autouse=True)
def seed():
    transformers.set_seed(0)


@pytest.fixture(autouse=True)
def arithmetic():
    """Of every test the same, whatever ran before it in this process: a training chooses the products that are fastest
    on this CPU. Tiny matrices take one thread: a second one would only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """The Hub at HF_ENDPOINT, empty, and `me` logged in to it."""
    with HubServer(tmp_path_factory.mktemp("hub"), port=_hub_port) as server:
        server.add_user("me", "hf_canary_of_me")
        monkeypatch.setenv("HF_TOKEN", "hf_canary_of_me")
        yield server


@pytest.fixture
def randomise():
    """Gives every parameter of a module a value of its own, biases and gains included, so that two that were mixed up
    or left out change the result. Returns the module."""

    @torch.no_grad()
    def randomise(module):
        for name, parameter in module.named_parameters():
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            torch.nn.init.normal_(parameter, mean=float(is_gain), std=0.2)
        return module

    return randomise


@pytest.fixture
def make_model(randomise):
    """A tiny randomised model of any class in evaluation mode: `make_model(model_class, attn_implementation=...,
    **config_fields)`."""

    def make_model(model_class, attn_implementation="eager", **fields):
        sizes = family_of(model_class).sizes
        config = model_class.config_class(**{**sizes, **fields}, attn_implementation=attn_implementation)
        return randomise(model_class(config)).eval()

    return make_model


@pytest.fixture
def make_layer(randomise):
    """A randomised float64 layer: `make_layer(MultiHeadAttention, layer arguments, config field=value, ...)`."""

    def make_layer(layer_class, *args, layer_kwargs=None, backend="eager", **fields):
        sizes = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40}
        config = TransformerConfig(**{**sizes, **fields}, attn_implementation=backend)
        return randomise(layer_class(config, *args, **(layer_kwargs or {}))).double().eval()

    return make_layer


@pytest.fixture
def make_gpt(make_model):
    """`make_model`, with the language model as its default."""
    return lambda model_class=ZooGPTForCausalLM, *args, **fields: make_model(model_class, *args, **fields)


@pytest.fixture
def make_bert(make_model):
    """`make_model`, with the masked language model as its default."""
    return lambda model_class=ZooBertForMaskedLM, *args, **fields: make_model(model_class, *args, **fields)


@pytest.fixture
def make_vit(make_model):
    """`make_model`, with the image classifier as its default."""
    return lambda model_class=ZooViTForImageClassification, *args, **fields: make_model(model_class, *args, **fields)


@pytest.fixture(params=GPT_OPTIONS)
def options(request):
    """The fields of each tiny GPT in turn."""
    return GPT_OPTIONS[request.param]


@pytest.fixture
def tokens():
    """Three rows of twelve random token ids."""
    return torch.randint(0, TINY_TEXT["vocab_size"], (3, 12))


@pytest.fixture
def stock_gpt2(randomise):
    """A tiny randomised stock GPT-2, eager and without dropout: `stock_gpt2(transformers.GPT2LMHeadModel, ...)`."""

    def stock_gpt2(model_class=transformers.GPT2LMHeadModel, **fields):
        sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        ends = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
        config = transformers.GPT2Config(**{**sizes, **no_dropout, **ends, **fields}, attn_implementation="eager")
        return randomise(model_class(config)).eval()

    return stock_gpt2


@pytest.fixture
def stock_bert(randomise):
    """A tiny randomised stock BERT, eager and without dropout: `stock_bert(transformers.BertForMaskedLM, ...)`."""

    def stock_bert(model_class=transformers.BertForMaskedLM, **fields):
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        sizes = {name: size for name, size in TINY_TEXT.items() if "dropout" not in name}
        config = transformers.BertConfig(
            **{**sizes, "intermediate_size": 128, **no_dropout, **fields}, attn_implementation="eager"
        )
        return randomise(model_class(config)).eval()

    return stock_bert


@pytest.fixture
def stock_vit(randomise):
    """A tiny randomised stock ViT or ViTMAE, eager: `stock_vit(transformers.ViTForImageClassification, ...)`."""

    def stock_vit(model_class=transformers.ViTForImageClassification, **fields):
        config_class = model_class.config_class
        sizes = TINY_MAE if config_class is transformers.ViTMAEConfig else TINY_VIT
        sizes = {name: size for name, size in sizes.items() if "dropout" not in name}
        widths = {"intermediate_size": 128, "decoder_intermediate_size": 64}
        widths = {name: width for name, width in widths.items() if hasattr(config_class, name)}
        config = config_class(**{**sizes, **widths, **fields}, attn_implementation="eager")
        return randomise(model_class(config)).eval()

    return stock_vit


@pytest.fixture
def images():
    """Three square images of noise, 16 pixels high and wide."""
    return torch.randn(3, 3, 16, 16)


@pytest.fixture
def sentences():
    """Three rows of twelve, nine and five random token ids, padded with 0 to twelve, each with two segments: the
    model's inputs."""
    lengths = torch.tensor([12, 9, 5])
    mask = (torch.arange(12) < lengths[:, None]).long()
    tokens = torch.randint(1, TINY_TEXT["vocab_size"], (3, 12)) * mask
    segments = (torch.arange(12) >= torch.tensor([7, 3, 4])[:, None]) * mask
    return {"input_ids": tokens, "attention_mask": mask, "token_type_ids": segments}


@pytest.fixture
def tokenizer():
    """One token per character; 64 tokens, of which the first ends a text."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,;:!?'-\n"
    vocabulary = {token: number for number, token in enumerate(["<end>", *letters])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    plain.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<end>")


@pytest.fixture
def masking_tokenizer():
    """BERT's kind: one token per letter, `[CLS] a [SEP] b [SEP]`, padding is 0; 34 tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: number for number, token in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz.,!"])}
    plain = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    plain.normalizer = normalizers.BertNormalizer()
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s*"), "removed")
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, **dict(zip(names, special, strict=True)), model_max_length=64
    )
