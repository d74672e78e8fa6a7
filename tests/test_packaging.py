"""What makes the two commands of the README work on a fresh machine: pins, the Makefile, public names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tidar

ROOT = Path(tidar.__file__).parent.parent
PIN = re.compile(r"[\w.-]+==[\w.]+")


def needed(name: str, extras: frozenset[str] = frozenset()) -> dict[str, list[Requirement]]:
    """All requirements that installing ``name[extras]`` brings here, by the distribution they are on."""
    found: dict[str, list[Requirement]] = {}
    todo, done = [(canonicalize_name(name), extras)], set()
    while todo:
        here = todo.pop()
        if here in done:
            continue
        done.add(here)
        for line in metadata.requires(here[0]) or ():
            wanted = Requirement(line)
            if wanted.marker and not any(wanted.marker.evaluate({"extra": e}) for e in here[1] | {""}):
                continue
            there = canonicalize_name(wanted.name)
            if there.startswith(("nvidia-", "cuda-")):
                continue  # only torch's wheels for GPUs bring them, and pin them
            found.setdefault(there, []).append(wanted)
            todo.append((there, frozenset(wanted.extras)))
    found.pop("tidar", None)
    return found


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(PIN.fullmatch(line) for line in lines), "an exact public version a line: no URL, no +cpu"
    names = [line.split("==")[0] for line in lines]
    assert names == sorted(names, key=str.lower)
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


def test_everything_that_is_installed_is_pinned_and_nothing_else() -> None:
    pinned, wanted = pins(), needed("tidar", frozenset({"dev"}))
    assert set(wanted) <= set(pinned)
    for name, requirements in wanted.items():
        for requirement in requirements:
            assert requirement.specifier.contains(pinned[name], prereleases=True), (
                f"{requirement} against {pinned[name]}"
            )
    # Another Python or platform may need a few more, never dozens.
    assert len(set(pinned) - set(wanted)) <= 3, set(pinned) - set(wanted)


def test_demo_needs_no_extra() -> None:
    core = needed("tidar")
    assert {"torch", "transformers", "tyro", "rich"} <= set(core)
    assert not {"datasets", "pytest", "mypy", "tensorboard", "datasketch"} & set(core)


def test_public_names() -> None:
    assert tidar.__version__ == metadata.version("tidar")
    for name in tidar.__all__:
        assert getattr(tidar, name).__name__ == name
        assert name in dir(tidar)
    with pytest.raises(AttributeError, match="no_such_name"):
        tidar.no_such_name  # noqa: B018


def test_files_are_short() -> None:
    long = {str(p): n for p in ROOT.glob("tidar/**/*.py") if (n := len(p.read_text().splitlines())) > 300}
    assert not long


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return path


def make(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # A make that runs the tests must not hand its own variables down.
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k not in ("PYTHON", "PIP_ARGS", "JOBS")}
    return subprocess.run(["make", *words], cwd=checkout, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("fake", "remedy"),
    [
        ('case "$2" in *ensurepip*) exit 1;; *) exec python3 "$@";; esac', r"sudo apt install python3\.\d+-venv"),
        (
            'case "$2" in *version_info\\ \\<*) exit 1;; *) echo Python 3.9.2;; esac',
            r"Python 3\.9\.2 is too old.*sudo apt install python3\.11 python3\.11-venv",
        ),
        (None, "sudo apt install python3 python3-venv"),
    ],
)
def test_a_missing_apt_package_is_named_in_one_line(fake: str | None, remedy: str, checkout: Path) -> None:
    python = script(checkout / "python", fake) if fake else checkout / "missing"
    done = make(checkout, "demo", f"PYTHON={python}")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1
    assert re.search(remedy, said[0])
    assert not (checkout / ".venv").exists()


def test_setup_installs_once_and_takes_up_what_failed(checkout: Path) -> None:
    # A python whose venv is itself, and whose pip writes down what it was asked for and fails if told to.
    body = f"""case "$*" in
      *"-m pip --version"*) exit 0;;
      *"-m pip install"*) echo "$@" >> {checkout}/log; test ! -e {checkout}/fail;;
      *"-m venv"*) mkdir -p {checkout}/.venv/bin && cp "$0" {checkout}/.venv/bin/python;;
      *) exit 0;;
    esac"""
    python = f"PYTHON={script(checkout / 'python', body)}"
    (checkout / "fail").touch()
    assert make(checkout, "setup", python).returncode != 0
    (checkout / "fail").unlink()
    assert make(checkout, "setup", python, "PIP_ARGS=--more").returncode == 0
    assert make(checkout, "setup", python).returncode == 0
    failed, installed = (checkout / "log").read_text().splitlines()
    assert "-c constraints.txt -e .[dev]" in failed
    assert installed.replace("--more ", "") == failed
    os.utime(checkout / "constraints.txt", (4e9, 4e9))
    assert make(checkout, "setup", python).returncode == 0
    assert len((checkout / "log").read_text().splitlines()) == 3, "new pins are installed"


def test_ci_runs_every_tier_once() -> None:
    run = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    [targets] = re.findall(r"^exec make (.*)$", run, re.MULTILINE)
    assert targets == "test test-all"
    planned = make(ROOT, "--dry-run", *targets.split()).stdout
    assert planned.count('-m "not slow"') == 1
    assert planned.count("-m slow") == 1
    for tool in ("ruff check", "mypy", "lint-imports"):
        assert planned.count(f".venv/bin/{tool}") == 1
