"""Makes a checkpoint one that an earlier version of this package left."""

import json
import re
from pathlib import Path

EARLIER_VERSION = "0.0.9"
# Modules that the current code no longer has. The first one makes the model's answers wrong.
FORMER = {
    "earlier.py": '''"""Of an earlier version."""

import functools

from .earliest import SHIFT


def spoil(model_class):
    forward = model_class.forward

    @functools.wraps(forward)
    def wrong(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs.logits = outputs.logits.roll(SHIFT, -1)
        return outputs

    model_class.forward = wrong
''',
    "earliest.py": "SHIFT = 7\n",
}


def age(folder: Path):
    """Gives the checkpoint of a ZooGPTForCausalLM code that computes something else, with other modules and fewer
    classes. It still loads."""
    for name, code in FORMER.items():
        (folder / name).write_text(code)
    code = (folder / "gpt.py").read_text()
    (folder / "gpt.py").write_text(f"{code}\n\nfrom .earlier import spoil\n\nspoil(ZooGPTForCausalLM)\n")
    code = (folder / "base.py").read_text()
    (folder / "base.py").write_text(
        re.sub('^ZOO_VERSION = ".*"', f'ZOO_VERSION = "{EARLIER_VERSION}"', code, flags=re.M)
    )
    config = json.loads((folder / "config.json").read_text())
    config["zoo_version"] = EARLIER_VERSION
    del config["auto_map"]["AutoModelForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
