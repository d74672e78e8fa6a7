"""What the host asks of the GPU while it decodes: between two readings of results, graph launches only.

    python runs/host_profile.py [--write results/host_calls.jsonl]

Profiles 100 steps of the reference checkpoint behind a 256-token prompt, for each method, and counts the CUDA runtime
calls of the host and the kernels of the device. One line a method.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile

from tidar.checkpoint import embedded_checkpoint, load_model
from tidar.config import SamplingParams
from tidar.decode.policy import Alternating, Autoregressive, Fixed, Policy
from tidar.fast.decoder import FastDecoder
from tidar.fast.engine import Engine
from tidar.provenance import record

ROOT = Path(__file__).resolve().parent.parent
STEPS = 100


def _on_device(event: Any) -> bool:
    return str(event.device_type) == "DeviceType.CUDA"


def calls(engine: Engine, policy: Policy) -> dict[str, object]:
    decoder = FastDecoder(engine, policy)
    with torch.inference_mode():
        decoder.prefill([list(range(2, 258))], [SamplingParams(max_new_tokens=1700)])
        for _ in range(10):
            decoder.step()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            for _ in range(STEPS):
                decoder.step()
    host = Counter(e.name for e in seen.events() if not _on_device(e) and e.name.startswith("cu"))
    kernels = Counter(e.name.split("(")[0][:60] for e in seen.events() if _on_device(e))
    return {
        "steps": STEPS,
        "host_calls_per_step": {name: count / STEPS for name, count in host.most_common()},
        "device_operations_per_step": {name: round(count / STEPS, 2) for name, count in kernels.most_common()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, default=ROOT / "results" / "host_calls.jsonl")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    engine = Engine(load_model(embedded_checkpoint(), device="cuda"))
    policies = {"ar": Autoregressive(), "tidar k=16": Fixed(16, 16), "linear k=16": Alternating(16)}
    for name, policy in policies.items():
        record(args.write, {"method": name, **calls(engine, policy)})


if __name__ == "__main__":
    main()
