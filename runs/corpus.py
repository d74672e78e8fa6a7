"""Python source from this machine as training data: the standard library and installed permissive packages.

    python runs/corpus.py --out DIR [--vocab 4096] [--holdout-fraction 0.035] [--workers N] [--extra-root DIR ...]

DIR receives tokenizer/ (for AutoTokenizer), train/ and holdout/ (for tidar.data.packing.PackedData),
holdout/files.jsonl (package, path, tokens, text: one line a document, in the cache's order), licences.json and
stats.json. The same packages give the same bytes.

Held out are whole packages, in the order of a hash of their names. Exact and near duplicates go, whichever package
they are in; what resembles a held-out file by half is not trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Runs from a checkout that is not installed, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runs.script import run
from tidar.data.cache import CacheWriter, fresh_folder
from tidar.data.dedup import digest, near_duplicates, signature
from tidar.data.installed import Package, installed_packages, reject, standard_library
from tidar.data.tokenizer import (
    encode_documents,
    end_of_text,
    plain_encoder,
    train_tokenizer,
    vocabulary_digest,
)
from tidar.errors import TidarError

MIN_PACKAGES = 15  # held out


@dataclass(frozen=True)
class Source:
    package: str
    path: str
    data: bytes
    signature: NDArray[np.uint32]


def read(path: str) -> tuple[str, bytes, NDArray[np.uint32] | None]:
    """(rule that leaves the file out or "", its bytes with plain line ends, its signature)."""
    try:
        data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    except OSError:
        return "unreadable", b"", None
    rule = reject(data)
    return (rule, b"", None) if rule else ("", data, signature(data))


def gather(packages: Sequence[Package], workers: int, removed: Counter[str]) -> list[Source]:
    names = [(p.name, file) for p in packages for file in p.files]
    paths = [str(p.root / file) for p in packages for file in p.files]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(read, paths, chunksize=32))
    sources, seen = [], set()
    for (package, path), (rule, data, minima) in zip(names, results, strict=True):
        if minima is not None and digest(data) in seen:
            rule = "exact duplicate"
        if rule or minima is None:
            removed[rule] += 1
            continue
        seen.add(digest(data))
        sources.append(Source(package, path, data, minima))
    return sources


def choose_holdout(sources: Sequence[Source], fraction: float) -> set[str]:
    """Packages by the hash of their names, none over a fifth of the wanted bytes, until there are bytes and packages
    enough."""
    size: Counter[str] = Counter()
    for source in sources:
        size[source.package] += len(source.data)
    wanted = fraction * size.total()
    chosen: set[str] = set()
    total = 0
    for package in sorted(size, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if total >= wanted and len(chosen) >= MIN_PACKAGES:
            break
        if size[package] <= wanted / 5:
            chosen.add(package)
            total += size[package]
    if not chosen:
        raise TidarError("no package is small enough to hold out: raise --holdout-fraction or add packages")
    return chosen


def drop_near(sources: list[Source], held: set[str], threshold: float, removed: Counter[str]) -> list[Source]:
    """Held-out files first, so that of a pair the one in training goes."""
    ordered = sorted(sources, key=lambda s: (s.package not in held, s.package, s.path))
    first = sum(s.package in held for s in ordered)
    twin = near_duplicates(np.stack([s.signature for s in ordered]), threshold, held=first)
    for source, other in zip(ordered, twin, strict=True):
        if other >= 0:
            leak = ordered[other].package in held and source.package not in held
            removed["near duplicate of the hold-out" if leak else "near duplicate"] += 1
    return [s for s, other in zip(ordered, twin, strict=True) if other < 0]


def sample(sources: Sequence[Source], size: int) -> list[str]:
    """Texts of about ``size`` bytes in all, drawn by the hash of their content."""
    texts, total = [], 0
    for source in sorted(sources, key=lambda s: digest(s.data)):
        if total >= size:
            break
        texts.append(source.data.decode())
        total += len(source.data)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab", type=int, default=4096, help="token ids in all")
    parser.add_argument("--holdout-fraction", type=float, default=0.035, help="share of the bytes to hold out")
    parser.add_argument("--near", type=float, default=0.7, help="similarity from which files are near duplicates")
    parser.add_argument("--tokenizer-mb", type=int, default=64, help="MB of text the tokenizer is trained on")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--extra-root", nargs="*", default=[], help="further site-packages folders")
    parser.add_argument("--no-installed", action="store_true", help="leave out this interpreter and its packages")
    parser.add_argument("--limit-packages", type=int, help="only the first N packages, for trials")
    args = parser.parse_args()

    started = time.perf_counter()

    def stage(text: str) -> None:
        nonlocal started
        now = time.perf_counter()
        print(f"{now - started:6.1f} s  {text}", flush=True)
        started = now

    packages, refused = ([], {}) if args.no_installed else installed_packages()
    if args.extra_root:
        known = {p.name for p in packages} | set(refused)
        more, others = installed_packages(args.extra_root)
        packages += [p for p in more if p.name not in known]
        refused |= others
    packages = [p for p in packages if p.name != "tidar"][: args.limit_packages]
    if not args.no_installed:
        packages.insert(0, standard_library())
    stage(f"{len(packages)} packages, {len(refused)} left out for their licences")

    removed: Counter[str] = Counter()
    sources = gather(packages, args.workers, removed)
    stage(f"{len(sources)} files read, {sum(len(s.data) for s in sources) / 1e6:.1f} MB")
    if not sources:
        raise TidarError("no Python file under a permissive licence was found: name folders with --extra-root")

    held = choose_holdout(sources, args.holdout_fraction)
    sources = drop_near(sources, held, args.near, removed)
    parts = {
        "train": [s for s in sources if s.package not in held],
        "holdout": [s for s in sources if s.package in held],
    }
    stage("kept " + ", ".join(f"{len(p)} files for {name}" for name, p in parts.items()))

    with fresh_folder(args.out) as folder:
        texts = sample(parts["train"], args.tokenizer_mb * 1_000_000)
        tokenizer = train_tokenizer(texts, vocab_size=args.vocab, out=folder / "tokenizer")
        stage(f"tokenizer of {len(tokenizer)} trained on {len(texts)} files")
        encoder, eos_id = plain_encoder(tokenizer), end_of_text(tokenizer)
        stats: dict[str, object] = {"removed": dict(sorted(removed.items()))}
        for name, part in parts.items():
            (folder / name).mkdir()
            with CacheWriter(folder / name, vocab_size=len(tokenizer), eos_id=eos_id) as cache:
                for source, ids in zip(
                    part, encode_documents(encoder, (s.data.decode() for s in part), eos_id), strict=True
                ):
                    cache.add(ids, len(source.data))
                cache.close({"tokenizer": vocabulary_digest(tokenizer)})
            tokens = sum(cache.lengths)
            stats[name] = {
                "packages": len({s.package for s in part}),
                "documents": len(part),
                "bytes": cache.text_bytes,
                "tokens": tokens,
                "bytes_per_token": cache.text_bytes / (tokens - len(part)),
                "documents_of_512_tokens": sum(n > 512 for n in cache.lengths),
            }
            stage(f"{name}: {json.dumps(stats[name])}")
        with (folder / "holdout" / "files.jsonl").open("w", encoding="utf-8") as file:
            for source, length in zip(parts["holdout"], cache.lengths, strict=True):
                line = {"package": source.package, "path": source.path, "tokens": length, "text": source.data.decode()}
                file.write(json.dumps(line) + "\n")
        files, size = Counter(s.package for s in sources), Counter[str]()
        for source in sources:
            size[source.package] += len(source.data)
        listed = [
            {"package": p.name, "version": p.version, "licence": p.licence, "held_out": p.name in held,
             "files": files[p.name], "bytes": size[p.name]}
            for p in packages if files[p.name]
        ]  # fmt: skip
        for name, content in {"licences": {"used": listed, "refused": refused}, "stats": stats}.items():
            (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    stage(f"wrote {args.out}; removed {stats['removed']}")


if __name__ == "__main__":
    run(main)
