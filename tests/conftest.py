"""What the tests share: a private Hugging Face home, one seed, tiny models of every kind, a tokenizer."""

import os
import tempfile

_hf_home = tempfile.TemporaryDirectory(prefix="hf_models_tests_")
os.environ["HF_HOME"] = _hf_home.name  # read when the libraries are imported, so it is set before them

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

from hf_models import ZooGPTConfig, ZooGPTForCausalLM  # noqa: E402

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

# Together they take every option of ZooGPTConfig to each of its values.
GPT_OPTIONS = {
    "gpt1": {"norm_position": "post", "hidden_act": "gelu"},
    "gpt2": {},
    "sinusoidal": {"position_embedding_type": "sinusoidal", "hidden_act": "relu", "tie_word_embeddings": False},
    "modern": {
        "position_embedding_type": "rotary",
        "norm": "rmsnorm",
        "qk_norm": True,
        "hidden_act": "relu2",
        "residual_init": "zero",
        "use_bias": False,
    },
    "grouped": {
        "position_embedding_type": "rotary",
        "rope_theta": 500.0,
        "hidden_act": "swiglu",
        "norm": "rmsnorm",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": False,
    },
    "multi_query": {"num_key_value_heads": 1, "hidden_act": "silu", "residual_init": "normal", "use_bias": False},
}


@pytest.fixture(autouse=True)
def seed():
    transformers.set_seed(0)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices: a second thread would only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
def make_gpt(randomise):
    """A tiny randomised GPT in evaluation mode: `make_gpt(model_class, attn_implementation=..., **config_fields)`."""

    def make_gpt(model_class=ZooGPTForCausalLM, attn_implementation="eager", **fields):
        config = ZooGPTConfig(**{**TINY, **fields}, attn_implementation=attn_implementation)
        return randomise(model_class(config)).eval()

    return make_gpt


@pytest.fixture(params=GPT_OPTIONS)
def options(request):
    """The fields of each tiny GPT in turn."""
    return GPT_OPTIONS[request.param]


@pytest.fixture
def tokens():
    """Three rows of twelve random token ids."""
    return torch.randint(0, TINY["vocab_size"], (3, 12))


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
def tokenizer():
    """One token per character; 64 tokens, of which the first ends a text."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,;:!?'-\n"
    vocabulary = {token: number for number, token in enumerate(["<end>", *letters])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    plain.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<end>")
