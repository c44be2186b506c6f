"""What a push costs: how many bytes for a run that is on the Hub already, and how much longer than a bare upload.

    python -m tests.benchmarks.publish [--unchanged_mb 500] [--sent_mb 200] [--mbit 100]

Against the small Hub of the tests, in a process of its own, whose line is throttled. A bare upload is huggingface_hub's
`upload_folder` of the same files, to another repository of the same Hub.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

from tests.hub_server import HubServer, hold_port

PORT, _hold = hold_port()
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{PORT}", "HF_TOKEN": "hf_of_me", "HF_HUB_DISABLE_XET": "1"}
os.environ |= {"NO_PROXY": "127.0.0.1,localhost", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import torch  # noqa: E402
from huggingface_hub import HfApi  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from hf_models.verify import write_checksums  # noqa: E402
from tests.finished_run import PUBLISHED, write_run  # noqa: E402
from training.hub.publish import push  # noqa: E402


def serve(folder: Path, commands, answers):
    """The Hub. A command is its bandwidth from now on; the answer, how many bytes have come since the last one."""
    with HubServer(folder, port=PORT) as hub:
        hub.add_user("me", "hf_of_me")
        while True:
            hub.bandwidth = commands.get()
            answers.put(sum(request.received for request in hub.requests))
            hub.requests.clear()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--unchanged_mb", type=int, default=500)
    parser.add_argument("--sent_mb", type=int, default=200)
    parser.add_argument("--mbit", type=float, default=100.0, help="of the line, in a second")
    args = parser.parse_args()
    context = multiprocessing.get_context("fork")
    commands, answers = context.Queue(), context.Queue()
    with tempfile.TemporaryDirectory(prefix="publish-") as folder:
        context.Process(target=serve, args=(Path(folder, "hub"), commands, answers), daemon=True).start()

        def measure(action, bandwidth=None) -> tuple[float, int]:
            """Seconds, and bytes that were sent."""
            commands.put(bandwidth)
            answers.get()
            started = time.perf_counter()
            action()
            seconds = time.perf_counter() - started
            commands.put(None)
            return seconds, answers.get()

        run = write_run(Path(folder, "run"))
        save_file({"weight": torch.randn(args.unchanged_mb * 250_000)}, run / "model.safetensors")
        write_checksums(run)
        push(run, "me/unchanged")
        seconds, size = measure(lambda: push(run, "me/unchanged"))
        print(f"unchanged, {args.unchanged_mb} MB: {size / 1e3:.1f} kB sent in {seconds:.1f} s")

        save_file({"weight": torch.randn(args.sent_mb * 250_000)}, run / "model.safetensors")
        write_checksums(run)
        line = args.mbit * 1e6 / 8
        pushed, _ = measure(lambda: push(run, "me/pushed"), line)

        def upload():
            HfApi().create_repo("me/uploaded")
            HfApi().upload_folder(repo_id="me/uploaded", folder_path=run, allow_patterns=[*PUBLISHED, "README.md"])

        uploaded, _ = measure(upload, line)
        print(
            f"{args.sent_mb} MB at {args.mbit:g} Mbit/s: push {pushed:.1f} s, bare upload {uploaded:.1f} s, "
            f"ratio {pushed / uploaded:.3f}"
        )


if __name__ == "__main__":
    main()
