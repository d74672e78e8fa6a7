"""runs/corpus.py on a small site-packages folder of our own making, and the rules it selects by."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tidar.data.cache import open_cache
from tidar.data.installed import installed_packages, licence_of, permissive, reject, standard_library
from tidar.data.packing import PackedData

SCRIPT = Path(__file__).parent.parent / "runs" / "corpus.py"


def code(seed: int, functions: int = 8) -> str:
    draw = random.Random(seed)
    word = [f"{a}{b}" for a in ("get", "set", "load", "make") for b in ("_item", "_row", "_name", "_value", "_node")]
    return "\n\n".join(
        f"def {draw.choice(word)}_{draw.randrange(999)}(self, {draw.choice(word)}):\n"
        f"    value = {draw.choice(word)}({draw.randrange(9999)})\n    return value.{draw.choice(word)}\n"
        for _ in range(functions)
    )


def install(root: Path, name: str, files: dict[str, str | bytes], metadata: str = "License-Expression: MIT") -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(text if isinstance(text, bytes) else text.encode())
    info = root / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{metadata}\n\n")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))


def run(root: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--extra-root", str(root), "--no-installed"]
    small = ["--vocab", "300", "--workers", "2", "--holdout-fraction", "0.3"]
    return subprocess.run([*command, *small, *more], capture_output=True, text=True, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_end_to_end(tmp_path: Path) -> None:
    root, out = tmp_path / "site", tmp_path / "out"
    for i in range(40):
        install(root, f"package{i}", {f"package{i}/{j}.py": code(100 * i + j) for j in range(3)})
    install(root, "copyleft", {"copyleft/a.py": code(1) + "COPYLEFT"}, "License: GPL-3.0")
    install(root, "silent", {"silent/a.py": code(2) + "SILENT"}, "Summary: says nothing")
    odd: dict[str, str | bytes] = {
        "odd/latin.py": b"name = '\xe9'\n" * 40,
        "odd/small.py": "x = 1\n",
        "odd/large.py": "x = 1\n" * 40_000,
        "odd/generated.py": "# This file is auto-generated.\n" + code(3),
        "odd/borrowed.py": "# GNU General Public License\n" + code(4),
        "odd/wide.py": f"x = '{'a' * 1500}'\n",
        "odd/table.py": "[" + "0x12, 0x34,\n" * 200 + "]\n",
        "odd/twin.py": code(100),  # package1's first file
        "odd/windows.py": "# windows\r\n" + code(5).replace("\n", "\r\n"),
        "odd/_vendor/lib.py": code(6),
        "odd/data.txt": code(7),
    }
    install(root, "odd", odd)
    done = run(root, out)
    assert done.returncode == 0, done.stderr
    licences = json.loads((out / "licences.json").read_text())
    assert licences["refused"] == {"copyleft": "GPL-3.0", "silent": "none stated"}
    held = [p["package"] for p in licences["used"] if p["held_out"]]
    assert len(held) >= 10
    stats = json.loads((out / "stats.json").read_text())
    rules = ["encoding", "exact duplicate", "generated", "large", "licence", "lines", "small", "table"]
    assert stats["removed"] == dict.fromkeys(rules, 1)
    assert stats["train"]["documents"] + stats["holdout"]["documents"] == 3 * 40 + 1

    # What was held out, as text and as tokens, and nothing of it in training.
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    assert (tokenizer.eos_token, tokenizer.mask_token, len(tokenizer)) == ("<|endoftext|>", "<|mask|>", 300)
    lines = [json.loads(line) for line in (out / "holdout" / "files.jsonl").read_text().splitlines()]
    assert {line["package"] for line in lines} == set(held)
    cache = open_cache(out / "holdout")
    for i, line in enumerate(lines):
        ids = cache.tokens[cache.offsets[i] : cache.offsets[i + 1]].tolist()
        assert len(ids) == line["tokens"]
        assert tokenizer.decode(ids[:-1]) == line["text"] == (root / line["path"]).read_text()
    train = open_cache(out / "train")
    text = tokenizer.decode(train.tokens.tolist())
    assert not any(line["text"] in text for line in lines)
    assert "COPYLEFT" not in text
    assert "SILENT" not in text
    assert "\r" not in text
    assert "# windows\ndef" in text
    PackedData(out / "train", seq_len=128, batch_size=2, seed=0).next()

    # A copy of held-out code in another package ("ape": late in the order of hashes, so in training) goes, and the
    # same input gives the same bytes.
    stolen = next(line for line in lines if len(line["text"]) > 400)
    install(root, "ape", {"ape/a.py": "import os  # vendored\n" + stolen["text"], "ape/b.py": code(8)})
    assert run(root, out).returncode == 0
    assert json.loads((out / "licences.json").read_text())["used"][0]["package"] == "ape"
    stats = json.loads((out / "stats.json").read_text())
    assert stats["removed"]["near duplicate of the hold-out"] == 1
    assert tokenizer.decode(open_cache(out / "train").tokens.tolist()).count("vendored") == 0
    assert run(root, tmp_path / "again", "--workers", "1").returncode == 0
    assert contents(out) == contents(tmp_path / "again")


def test_nothing_found(tmp_path: Path) -> None:
    done = run(tmp_path, tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr == (
        "error: no Python file under a permissive licence was found: name folders with --extra-root\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("statement", "good"),
    [
        *((name, True) for name in ("MIT", "BSD-3-Clause", "Apache 2.0", "Apache License, Version 2.0", "PSF-2.0")),
        *((name, True) for name in ("3-Clause BSD License", "ISC License (ISCL)", "Apache-2.0 OR BSD-2-Clause")),
        *((name, True) for name in ("Apache-2.0 WITH LLVM-exception", "BSD-3-Clause AND 0BSD AND Zlib AND CC0-1.0")),
        ("Historical Permission Notice and Disclaimer (HPND)", True),
        ("Python Software Foundation License", True),
        *((name, False) for name in ("", "License", "GPL-3.0", "LGPL-2.1-or-later", "MPL-2.0 AND MIT", "BSD-4-Clause")),
        *((name, False) for name in ("Mozilla Public License 2.0 (MPL 2.0)", "LicenseRef-NVIDIA-Proprietary")),
        *((name, False) for name in ("BUSL-1.1", "CC-BY-NC-4.0", "Proprietary", "MIT OR GPL-2.0", "AGPL")),
        ("GNU General Public License v3 (GPLv3)", False),
    ],
)
def test_permissive(statement: str, good: bool) -> None:
    assert permissive(statement) is good


CLASSIFIER = "Classifier: License :: OSI Approved :: "
MIT_TEXT = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software"


@pytest.mark.parametrize(
    ("metadata", "files", "expected"),
    [
        ("License-Expression: MIT\nLicense: GPL", {}, ("MIT", True)),  # the expression is the newer field
        (CLASSIFIER + "MIT License\nLicense: MIT", {}, ("MIT License / MIT", True)),
        (CLASSIFIER + "MIT License\nLicense: GPL", {}, ("MIT License / GPL", False)),
        (CLASSIFIER + "MIT License\n" + CLASSIFIER + "Mozilla Public License 2.0 (MPL 2.0)", {}, (None, False)),
        ("Classifier: License :: OSI Approved\nLicense: ISC", {}, ("ISC", True)),
        ("License: UNKNOWN\n" + CLASSIFIER + "BSD License", {}, ("BSD License", True)),
        ("License: See the LICENSE file\nLicense-File: LICENSE", {"LICENSE": MIT_TEXT}, (None, True)),
        ("License-File: LICENSE", {"licenses/LICENSE": MIT_TEXT}, (None, True)),
        ("License-File: LICENSE", {"LICENSE": MIT_TEXT + " GNU General Public License"}, (None, False)),
        ("License-File: LICENSE", {"LICENSE": "All rights reserved."}, (None, False)),
        ("License-File: LICENSE", {}, (None, False)),
        (f"License: {MIT_TEXT}, and a line that makes it long enough for a text", {}, (None, True)),
        ("Summary: nothing", {}, ("none stated", False)),
    ],
)
def test_licence_of(tmp_path: Path, metadata: str, files: dict[str, str], expected: tuple[Any, bool]) -> None:
    info = tmp_path / "x-1.dist-info"
    (info / "licenses").mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: x\nVersion: 1\n{metadata}\n")
    for name, text in files.items():
        (info / name).write_text(text)
    licence, good = licence_of(PathDistribution(info))
    assert good is expected[1]
    assert expected[0] in (None, licence)


def test_packages_are_found_once_and_remains_ignored(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        install(tmp_path / folder, "Some_Name", {"some/a.py": folder, "../bin/tool.py": "x"})
    (tmp_path / "two" / "remains-1.0.dist-info").mkdir()
    found, refused = installed_packages([str(tmp_path / "one"), str(tmp_path / "two")])
    assert [(p.name, p.version, p.files) for p in found] == [("some-name", "1.0", ("some/a.py",))]
    assert (found[0].root / "some/a.py").read_text() == "one"
    assert refused == {}


def test_standard_library() -> None:
    package = standard_library()
    assert (package.name, package.licence) == ("python", "PSF-2.0")
    assert "json/decoder.py" in package.files
    assert not any("site-packages" in file for file in package.files)
    kept = [
        f for f in ("json/decoder.py", "argparse.py", "typing.py") if reject((package.root / f).read_bytes()) is None
    ]
    assert len(kept) == 3


def test_generated_means_a_comment_that_says_so() -> None:
    body = b"value = compute(other)\n" * 20
    assert reject(b"# Generated by the protocol buffer compiler.  DO NOT EDIT!\n" + body) == "generated"
    assert reject(b'"""The group generated by reflections."""\n' + body) is None
    assert reject(b"import matplotlib as mpl\n" + body) is None  # no Mozilla licence
