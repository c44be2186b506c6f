"""Real training processes for the tests: started, killed, and what they leave compared."""

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[2]
TRAINER = str(REPOSITORY / "tests" / "faults" / "trainer.py")
TRAIN_GPT = str(REPOSITORY / "training" / "train_gpt.py")

STEPS, BATCH, SAVE_EVERY = 24, 8, 6
OPTIONS = {
    "global_batch_size": BATCH,
    "max_steps": STEPS,
    "optimizer": "muon",
    "ema_decay": 0.9,
    "learning_rate": 3e-3,
    "warmup_steps": 4,
    "save_every": SAVE_EVERY,
    "eval_every": 12,
    "log_every": 3,
    "mixed_precision": "no",
}
SCRIPTS = {  # what each needs besides; `data` is one of those that Trainers writes; behind a dash, one of several ways
    "train_gpt": {"data": "text.txt", "tokenizer": "char", "context_length": 16, "sample_tokens": 8},
    "train_bert": {"data": "text.txt", "vocab_size": 200, "row_length": 32, "scored_rows": 1},
    "finetune_bert": {"data": "labelled.csv", "task": "classify", "model": "bert-tiny", "max_length": 32},
    "train_vit": {
        **{"data": "pictures", "model": "vit-mini-patch4-28", "image_size": 12, "num_workers": 1},
        **{"crop_scale": 0.3, "translate": 1, "flip": 0.5, "rand_augment_ops": 1, "color_jitter": 0.2, "erasing": 0.2},
        **{"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1},
    },
    "train_vit-mae": {
        **{"data": "pictures", "objective": "mae", "model": "vit-mae-mini-patch4-28", "image_size": 12},
        **{"num_workers": 0, "crop_scale": 0.3, "flip": 0.5},
        "config": {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2},
    },
    "train_detr": {
        **{"data": "shapes", "model": "detr-mini", "num_workers": 1, "optimizer": "adamw", "learning_rate": 1e-3},
        **{"shortest_edge": 32, "scale_jitter": 0.2, "crop": 0.5, "flip": 0.5, "color_jitter": 0.2},
        "config": {"intermediate_size": 32, "num_decoder_layers": 2, "num_queries": 8, "num_denoising_groups": 2},
    },
}
MODEL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


class Run:
    """One process, or one launcher with its processes; `output` and `errors` are what it has printed so far."""

    def __init__(self, folder: Path, pid: int, status):
        self.folder, self.pid, self._status = folder, pid, status

    @property
    def output(self) -> str:
        return (self.folder / "stdout").read_text(errors="replace")

    @property
    def errors(self) -> str:
        """Standard error without progress bars."""
        lines = (self.folder / "stderr").read_text(errors="replace").replace("\r", "\n").splitlines()
        return "\n".join(line for line in lines if line.strip() and "%|" not in line and "?it/s" not in line)

    def wait(self, expected: int | None = None) -> int:
        """The exit code, minus the signal that killed it."""
        code = os.waitstatus_to_exitcode(self._status())
        if expected is not None:
            assert code == expected, f"exit code {code}\n{self.output}\n{self.errors}"
        return code


def draw_shapes(folder: Path, name: str, choose: random.Random):
    """A picture with up to three shapes, none in some, and their boxes in YOLO's form."""
    width, height = choose.randint(30, 50), choose.randint(30, 50)
    noise = bytes(choose.randint(100, 155) for _ in range(width * height))
    picture, lines = Image.frombytes("L", (width, height), noise), []
    for _ in range(choose.randint(0, 3)):
        w, h = choose.randint(8, 16), choose.randint(8, 16)
        x, y, label = choose.randint(0, width - w), choose.randint(0, height - h), choose.randint(0, 1)
        draw = ImageDraw.Draw(picture)
        [draw.ellipse, draw.rectangle][label]((x, y, x + w - 1, y + h - 1), fill=choose.randint(180, 255))
        lines.append(f"{label} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}")
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    picture.save(folder / "images" / f"{name}.png")
    (folder / "labels" / f"{name}.txt").write_text("\n".join(lines))


class Trainers:
    """Starts trainings, all on the same text."""

    def __init__(self, folder: Path):
        self.folder = folder
        words = ["the", "zebra", "quietly", "folded", "seventeen", "maps", "of", "xylophones", "before", "dawn"]
        choose = random.Random(0)
        lines = [" ".join(choose.choices(words, k=9)) + "." for _ in range(500)]
        self.text = folder / "text.txt"
        self.text.write_text("\n".join(lines))
        labelled = [f"{line},{'colour' if 'zebra' in line else 'grey'}" for line in lines]
        (folder / "labelled.csv").write_text("\n".join(["text,label", *labelled]))
        for number in range(60):
            picture = folder / "pictures" / ("light" if number % 2 else "dark") / f"{number}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            size = choose.randint(8, 30), choose.randint(8, 30)
            shade = 128 * (number % 2) + choose.randint(0, 127)
            Image.effect_noise(size, 50).point(lambda value, shade=shade: (value + shade) // 2).save(picture)
        for number in range(40):
            draw_shapes(folder / "shapes", f"{number}", choose)
        (folder / "shapes" / "classes.txt").write_text("ellipse\nrectangle\n")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")},
            "HF_HOME": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **({"ACCELERATE_USE_CPU": "true"} if torch.accelerator.is_available() else {}),
            "PYTHONPATH": str(REPOSITORY),
        }
        self.server = subprocess.Popen(
            [sys.executable, TRAINER, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment,
            text=True,
        )
        self.count = 0

    def command(self, output_dir: Path, script: str = "train_gpt", dropout: float = 0.0, **options) -> list[str]:
        model = {**MODEL, "hidden_dropout": dropout, "attention_dropout": dropout}
        model |= {**SCRIPTS[script].get("config", {}), **options.pop("config", {})}
        if script.startswith("train_vit"):
            model["drop_path"] = dropout
        data = self.folder / SCRIPTS[script]["data"]
        options = {**OPTIONS, **SCRIPTS[script], "data": data, "output_dir": output_dir, **options}
        options["config"] = ",".join(f"{name}={value}" for name, value in model.items())
        return [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]

    def start(
        self, output_dir: Path, *hooks: str, env: dict | None = None, script: str = "train_gpt", **options
    ) -> Run:
        """A process of its own, forked from one that has made the imports. hooks: see trainer.py."""
        return self.start_argv(
            ["--script", script.split("-")[0], *hooks, *self.command(output_dir, script, **options)], env
        )

    def start_argv(self, argv: list[str], env: dict | None = None) -> Run:
        folder = self._new_folder()
        request = {"argv": argv, "env": env or {}, "folder": str(folder)}
        pid = self._ask(request)
        return Run(folder, pid, lambda: self._ask({"wait": pid, "seconds": 100}))

    def run(self, output_dir: Path, *hooks: str, expected: int = 0, **options) -> Run:
        run = self.start(output_dir, *hooks, **options)
        run.wait(expected)
        return run

    def start_ranks(self, output_dir: Path, number: int, *hooks: str, env: dict | None = None, **options) -> list[Run]:
        """Processes that train together through gloo, without a launcher that would end them all."""
        shared = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": free_port(), **(env or {})}
        ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(number)]
        ranks = [{name: str(value) for name, value in rank.items()} for rank in ranks]
        return [self.start(output_dir, *hooks, env=rank, **options) for rank in ranks]

    def run_ranks(self, output_dir: Path, number: int, *hooks: str, expected: int = 0, **options) -> list[Run]:
        runs = self.start_ranks(output_dir, number, *hooks, **options)
        for run in runs:
            run.wait(expected)
        return runs

    def launch(self, output_dir: Path, *hooks: str, launcher: tuple = ("--cpu",), file=TRAINER, **options) -> Run:
        """`accelerate launch` in a process group of its own."""
        folder = self._new_folder()
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *launcher, file]
        with open(folder / "stdout", "wb") as output, open(folder / "stderr", "wb") as errors:
            process = subprocess.Popen(
                [*command, *hooks, *self.command(output_dir, **options)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )

        def status() -> int:
            code = process.wait(180)
            return code << 8 if code >= 0 else -code

        return Run(folder, process.pid, status)

    def launch_processes(self, output_dir: Path, number: int, *hooks: str, config="cpu_processes", **options) -> Run:
        config = str(REPOSITORY / "training" / "accelerate" / f"{config}.yaml")
        launcher = ("--config_file", config, "--num_processes", str(number))
        return self.launch(output_dir, *hooks, launcher=launcher, **options)

    def _new_folder(self) -> Path:
        self.count += 1
        folder = self.folder / f"process-{self.count}"
        folder.mkdir()
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        return folder

    def _ask(self, request: dict) -> int:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())


def read_metrics(folder: Path) -> list[dict]:
    """metrics.jsonl without what is measured in time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("per_second")} for line in lines]


def read_results(folder: Path) -> dict:
    """What was measured at the end, without what is measured in time."""
    results = json.loads((folder / "eval_results.json").read_text())
    measured = {name: value for name, value in results.items() if name.startswith("eval_")}
    measured = {name: value for name, value in measured.items() if not name.endswith("per_second")}
    return {**measured, "sample": results.get("sample"), "best_step": results.get("best_step")}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def checkpoint_names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_same_result(folder: Path, expected: Path):
    """Weights, last checkpoint, metrics and results are the same, bit for bit."""
    assert (folder / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    last = checkpoint_names(expected)[-1]
    assert checkpoint_names(folder)[-1] == last
    for name in sorted(path.name for path in (expected / "checkpoints" / last).glob("*.safetensors")):
        ours, theirs = (load_file(run / "checkpoints" / last / name) for run in (folder, expected))
        assert ours.keys() == theirs.keys()
        different = [key for key in ours if ours[key].numpy().tobytes() != theirs[key].numpy().tobytes()]
        assert not different, f"{name}: {different}"
    assert read_metrics(folder) == read_metrics(expected)
    assert read_results(folder) == read_results(expected)


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but the lock."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def in_a_process(action, *arguments, method: str = "fork") -> int:
    """Runs `action` in a process of its own; how that ended: 0, or minus the signal that killed it.

    Args:
        method: "fork" runs any function. Where torch sees an accelerator, a fork of a process that has computed
            gradients cannot compute any; "forkserver" forks a process that has computed nothing, and runs a function
            of a module with arguments that can be pickled.
    """
    process = multiprocessing.get_context(method).Process(target=action, args=arguments)
    process.start()
    process.join()
    assert process.exitcode <= 0, f"the process failed with exit code {process.exitcode}; its traceback is above"
    return process.exitcode


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(condition, seconds: float = 180, what: str = "what was waited for"):
    """Polls until `condition()` is true and returns it."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen in {seconds} s"
        time.sleep(0.02)
    return result


def trainers_of(launcher: int) -> list[int]:
    """The processes that run a script for a launcher, and not what else its imports have started."""
    try:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        commands = {int(child): Path(f"/proc/{child}/cmdline").read_text().split("\0") for child in children}
    except (FileNotFoundError, ProcessLookupError):  # one has ended meanwhile
        return []
    return [child for child, command in commands.items() if any(word.endswith(".py") for word in command[1:3])]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def kill(pid: int):
    os.kill(pid, signal.SIGKILL)
