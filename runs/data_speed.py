"""Speed of streamed data alone, by number of workers: reading, tokenising and packing, with no model.

    python runs/data_speed.py [--workers 0 1 2 4] [--seconds 20] [--kind parquet] [--lanes 16] [--out FILE]

The texts are the Python standard library's files, dealt to shards as a data set has them; the tokenizer is that of the
reference checkpoint. For each number of workers: tokens per second from the first micro-batch on, and the seconds
until it came. Each line is appended to results/data_speed.jsonl. What else runs on the machine is missing in the
figures (``load`` says how much): they mean something on an idle machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import AutoTokenizer

from runs.script import run
from tidar.checkpoint import embedded_checkpoint
from tidar.data.config import DataConfig, Stream
from tidar.data.installed import standard_library
from tidar.data.streaming import StreamedData
from tidar.provenance import record

RESULTS = Path(__file__).resolve().parent.parent / "results" / "data_speed.jsonl"
SHARDS = 16


def write(folder: Path, kind: str) -> tuple[int, int]:
    """The standard library's files in ``SHARDS`` files of a data set; their number and bytes."""
    library = standard_library()
    paths = [library.root / name for name in library.files]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    for shard in range(SHARDS):
        part = texts[shard::SHARDS]
        if kind == "parquet":
            import pyarrow as pa  # type: ignore[import-untyped]
            from pyarrow import parquet

            parquet.write_table(pa.table({"text": part}), folder / f"{shard:02}.parquet", row_group_size=100)
        else:
            lines = [json.dumps({"text": text}) for text in part]
            (folder / f"{shard:02}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return len(texts), sum(len(text.encode()) for text in texts)


def measure(config: DataConfig, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens taken a second over ``args.seconds``, as fast as they come."""
    shape = {"seq_len": args.seq_len, "batch_size": args.lanes, "accumulate": 1, "lanes": args.lanes, "seed": 0}
    begun = time.perf_counter()
    data = StreamedData(config, tokenizer, **shape)
    try:
        data.next()
        first = time.perf_counter()
        tokens, now = 0, first
        while now - first < args.seconds:
            tokens += data.next().tokens.numel()
            now = time.perf_counter()
    finally:
        data.close()
    return {"tokens_per_second": round(tokens / (now - first)), "first_batch_seconds": round(first - begun, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--kind", choices=("parquet", "jsonl"), default="parquet")
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--tokenizer", default=str(embedded_checkpoint()))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # 0 workers: one core, as for each worker
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        documents, size = write(Path(folder), args.kind)
        stream = Stream(path=f"{folder}/*.{args.kind}")
        for workers in args.workers:
            config = DataConfig(streams=(stream,), lanes=args.lanes, workers=workers, holdout=0.0)
            found = {"workers": workers, "cores": os.cpu_count(), "load": os.getloadavg()[0]}
            found |= {"kind": args.kind, "lanes": args.lanes, "documents": documents, "bytes": size}
            record(args.out, {**found, **measure(config, tokenizer, args)})


if __name__ == "__main__":
    run(main)
