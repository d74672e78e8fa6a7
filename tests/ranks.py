"""Start training on several ranks as a user would, with torchrun; as a program, be one rank in which a test's fault
happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TIMEOUT = 300

RECIPE: dict[str, Any] = {
    "seq_len": 24,
    "micro_batch": 1,
    "batch_tokens": 6 * 24,
    "tokens": 20 * 6 * 24,
    "block_sizes": [3, 4],
    "kl_weight": 0.5,
    "transition": 8,
    "optimizer": "adamw",
    "lr": 1e-2,
    "min_lr": 1e-3,
    "warmup": 0.2,
    "log_every": 1,
    "eval_tokens": 96,
    "save_every": 5,
}


def write_recipe(path: Path, model: Path, text: Path | str, *, streamed: bool = False, **changes: Any) -> Path:
    """A recipe of 20 steps of six micro-batches; ``text`` is a folder, or files that are ``streamed``."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in {**RECIPE, "model": str(model), **changes}.items()]
    lines += ["[data]", 'duplicates = "keep"', "holdout = 0.2"]
    if streamed:
        lines += ["lanes = 6", "shuffle = 90", "workers = 1", "patience = 3", "[[data.streams]]", f'path = "{text}"']
    else:
        lines += [f"sources = [{json.dumps(str(text))}]"]
    path.write_text("\n".join(lines) + "\n")
    return path


def start(
    recipe: Path, out: Path, *words: str, ranks: int = 2, fault: str = "", restarts: int = 0
) -> subprocess.Popen[str]:
    """Begin a run; ``fault`` is one of `main`'s."""
    single = [sys.executable]
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = several + [f"--max-restarts={restarts}"] if ranks > 1 else single
    command += [__file__, "train", str(recipe), "--out", str(out), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TIDAR_TEST_FAULT": fault, "PYTHONPATH": _path()}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def _path() -> str:
    return os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])


def run(recipe: Path, out: Path, *words: str, ok: bool = True, **options: Any) -> list[str]:
    """What the run printed on stderr, torchrun's own lines among it."""
    process = start(recipe, out, *words, **options)
    text = ended(process)
    assert (process.returncode == 0) == ok, text
    return text.splitlines()


def ended(process: subprocess.Popen[str]) -> str:
    """What ``process`` printed on stderr until its end, which comes soon or is brought about."""
    try:
        return process.communicate(timeout=TIMEOUT)[1]
    except BaseException:
        process.terminate()  # torchrun takes its ranks with it
        process.wait(60)
        raise


def errors(lines: list[str]) -> list[str]:
    """The errors among ``lines``, without the prefix."""
    return [line.removeprefix("tidar: error: ") for line in lines if line.startswith("tidar: error: ")]


def main(argv: list[str]) -> int:
    """One rank. ``TIDAR_TEST_FAULT`` is ``what:rank:step``: there, and before the first restart only, it happens.

    ``late`` comes before the first step. ``record`` and what begins with ``slow`` are for all ranks and steps.
    """
    import torch

    from tidar.checkpoint import save_model
    from tidar.cli import main as command
    from tidar.data.streaming import StreamedData
    from tidar.errors import TidarError
    from tidar.train import checkpoint, shards
    from tidar.train.step import Stepper

    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    what, where, when = (os.environ["TIDAR_TEST_FAULT"] or "none:0:0").split(":")
    mine = where == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    step_of = Stepper.__call__
    write_manifest = checkpoint.write_manifest

    def late(*args: Any, **options: Any) -> None:
        time.sleep(2)
        save_model(*args, **options)

    def lack(_: Any) -> Any:
        raise TidarError("the test's source was out of reach")

    def slowly(folder: Path, digests: Any) -> None:
        time.sleep(2)
        write_manifest(folder, digests)
        steps = len((folder.parent.parent / "metrics.jsonl").read_text().splitlines())
        print(f"{folder.name} written when {steps} steps were done", file=sys.stderr, flush=True)

    if what == "late" and mine:
        time.sleep(4)
    if what.startswith("slow"):
        shards.save_model = late  # type: ignore[attr-defined]  # before any rank writes its part, so that training passes it by
        checkpoint.write_manifest = slowly

    def stepped(self: Stepper, batches: Any, step: int, lr: float) -> Any:
        if what == "record":
            with Path(self.config.out, f"rank-{rank}.jsonl").open("a") as file:
                file.write(json.dumps([step, [[part.tolist() for part in batch[:3]] for batch in batches]]) + "\n")
        if mine and step == int(when):
            if what.endswith("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "term":
                os.kill(os.getpid(), signal.SIGTERM)
            if what == "memory":
                raise torch.OutOfMemoryError("no room for a test")
            if what == "nan":
                hidden = self.model.hidden
                self.model.hidden = lambda *a, **k: hidden(*a, **k) * float("nan")  # type: ignore[method-assign]
            if what == "lack":
                StreamedData.next = lack  # type: ignore[assignment, method-assign]
            if what == "disk":
                import resource

                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        return step_of(self, batches, step, lr)

    Stepper.__call__ = stepped  # type: ignore[method-assign]
    if what == "argument" and mine:
        argv = [*argv, "--lr", "0.02"]
    return command(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
