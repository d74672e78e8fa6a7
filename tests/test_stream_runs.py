"""Runs on streams, by one process and by several: the same data and weights, whatever stops them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ranks
from test_distributed import close_weights, curve, same_curve
from train_data import same_weights, write_text

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text in seven files."""
    folder = tmp_path_factory.mktemp("streams")
    texts = [path.read_text() for path in sorted(write_text(folder / "text", documents=140).iterdir())]
    (folder / "lines").mkdir()
    for number in range(7):
        lines = [json.dumps({"text": text}) for text in texts[number::7]]
        (folder / "lines" / f"{number}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def recipe(root: Path, converted: Callable[[str], Path]) -> Path:
    return ranks.write_recipe(root / "recipe.toml", converted("qwen3"), f"{root}/lines/*.jsonl", streamed=True)


@pytest.fixture(scope="module")
def one(root: Path, recipe: Path) -> Path:
    """What one process makes of the recipe, and the batches it was given."""
    ranks.run(recipe, root / "one", ranks=1, fault="record:0:0")
    return root / "one"


@pytest.fixture(scope="module")
def two(root: Path, recipe: Path) -> Path:
    """What two ranks make of it, and the batches that they were given."""
    ranks.run(recipe, root / "two", fault="record:0:0")
    return root / "two"


def given(out: Path, size: int) -> dict[tuple[int, int], Any]:
    """The micro-batches by step and number."""
    found = {}
    for rank in range(size):
        for step, batches in map(json.loads, (out / f"rank-{rank}.jsonl").read_text().splitlines()):
            for number, batch in enumerate(batches):
                found[step, number * size + rank] = batch
    return found


def test_two_ranks_are_given_what_one_is(one: Path, two: Path) -> None:
    assert given(one, 1) == given(two, 2)
    assert len(given(one, 1)) == 20 * 6
    same_curve(one, two)


def test_two_ranks_then_one_then_three(recipe: Path, one: Path, tmp_path: Path) -> None:
    ranks.run(recipe, tmp_path / "run", ranks=2, fault="term:1:6")
    ranks.run(recipe, tmp_path / "run", "--resume", ranks=1, fault="term:0:12")
    ranks.run(recipe, tmp_path / "run", "--resume", "--data.workers", "0", ranks=3)
    same_curve(one, tmp_path / "run")
    close_weights(one / "model", tmp_path / "run" / "model")


def test_kill_9(recipe: Path, one: Path, two: Path, tmp_path: Path) -> None:
    ranks.run(recipe, tmp_path / "one", ranks=1, fault="kill:0:8", ok=False)
    ranks.run(recipe, tmp_path / "one", "--resume", ranks=1)
    assert same_weights(tmp_path / "one" / "model", one / "model")
    assert curve(tmp_path / "one") == curve(one)
    ranks.run(recipe, tmp_path / "two", fault="kill:1:13", restarts=1)
    assert same_weights(tmp_path / "two" / "model", two / "model")
    assert curve(tmp_path / "two") == curve(two)


def test_a_loss_that_is_not_finite(recipe: Path, one: Path, tmp_path: Path) -> None:
    """The batch is read again, by one rank for all."""
    import torch

    lines = ranks.run(recipe, tmp_path / "run", fault="nan:1:7", ok=False)
    assert any("not finite at step 7" in line for line in ranks.errors(lines))
    kept = torch.load(tmp_path / "run" / "bad-batch-00000007.pt", weights_only=True)
    wanted = given(one, 1)
    assert kept["tokens"].tolist() == [wanted[7, number][0][0] for number in range(6)]


def test_a_rank_that_loses_its_data_stops_all(recipe: Path, two: Path, tmp_path: Path) -> None:
    lines = ranks.run(recipe, tmp_path / "run", fault="lack:1:6", ok=False)
    assert ranks.errors(lines) == ["the test's source was out of reach; step 7 is saved, go on with --resume"]
    ranks.run(recipe, tmp_path / "run", "--resume")
    assert same_weights(tmp_path / "run" / "model", two / "model")
    assert curve(tmp_path / "run") == curve(two)


COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as it takes to stream the data set me/code; breaks off once it was asked for enough files."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.split("?")[0]
        file = self.server.files.get(path.removeprefix(f"/datasets/me/code/resolve/{COMMIT}/"))
        self.server.asked += file is not None
        if self.server.asked > self.server.limit:
            self.close_connection = True
        elif path == f"/api/datasets/me/code/tree/{COMMIT}":
            found = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in self.server.files.items()]
            self.send(200, json.dumps(found).encode())
        elif path in ("/api/datasets/me/code", f"/api/datasets/me/code/revision/{COMMIT}"):
            self.send(200, json.dumps({"id": "me/code", "sha": COMMIT, "siblings": []}).encode())
        elif file is not None:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            self.send(206, file[int(first) : int(last) + 1], ETag='"file"', **{"X-Repo-Commit": COMMIT})
        else:
            self.send(404, b"{}", **{"X-Error-Code": "EntryNotFound"})

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    made.files = {f"train-{path.name}": path.read_bytes() for path in (root / "lines").iterdir()}
    made.asked, made.limit = 0, 10**9
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{made.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_a_hub_that_goes_away_and_comes_back(
    converted: Callable[[str], Path], hub: Any, one: Path, tmp_path: Path
) -> None:
    """The run stops with a checkpoint and one line; resumed, it comes to the weights of a run that nothing stopped."""
    recipe = ranks.write_recipe(tmp_path / "recipe.toml", converted("qwen3"), "me/code", streamed=True, save_every=50)
    hub.limit = 20
    lines = ranks.run(recipe, tmp_path / "run", ranks=1, ok=False)
    (error,) = ranks.errors(lines)
    assert error.startswith("me/code was out of reach for 3 s (")
    step = int(error.split("; step ")[1].split()[0])
    assert 0 < step < 20 and error.endswith(f"step {step} is saved, go on with --resume")
    assert (tmp_path / "run" / "latest").resolve().name == f"step-{step:08d}"
    assert any(line.startswith("me/code is out of reach") and "trying again in 1 s" in line for line in lines)
    hub.limit = 10**9
    ranks.run(recipe, tmp_path / "run", "--resume", ranks=1)
    assert curve(tmp_path / "run") == curve(one), "as from files"
    assert same_weights(tmp_path / "run" / "model", one / "model")
