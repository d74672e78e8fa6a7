"""Run every test of kernels and captured steps on a GPU, planted faults included; keep the raw log.

    python runs/gpu_check.py [--write results/gpu_check.log] [pytest's arguments]

The log begins with a line of provenance and ends with pytest's summary. Exit status is pytest's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from tidar.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "test_kernels.py",
    "test_rotate_attend.py",
    "test_products.py",
    "test_hopper.py",
    "test_hopper_tiles.py",
    "test_residual.py",
    "test_sample_kernel.py",
    "test_draft_kernel.py",
    "test_chain.py",
    "test_chain_launch.py",
    "test_quantised.py",
    "test_quantised_models.py",
    "test_step_kernels.py",
    "test_fast.py",
    "test_fast_kernels.py",
    "test_lean.py",
    "test_deterministic.py",
    "test_adapters_fast.py",
    "test_proposals.py",
    "test_alternates.py",
    "test_alternates_kernels.py",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, default=ROOT / "results" / "gpu_check.log")
    args, others = parser.parse_known_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    # pytest-benchmark, where it is installed, warns under xdist, and warnings are errors here.
    quiet = ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    command = [sys.executable, "-m", "pytest", *(f"tests/{name}" for name in TESTS), "-v", *quiet]
    # Tests that compile in processes of their own find the package there too, installed or not.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with args.write.open("w", encoding="utf-8") as log:
        log.write(json.dumps(provenance()) + "\n")
        log.flush()
        done = subprocess.run([*command, *others], cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, check=False)
    print("\n".join(args.write.read_text(encoding="utf-8").splitlines()[-25:]))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
