"""Runs on streams, by one process and by several: the same data and weights, whatever stops them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
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


class Handler(SimpleHTTPRequestHandler):
    """Serves files, parts of them too, until its server is told to be out of order."""

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        server: Any = self.server
        server.asked += body
        if server.asked > server.limit:
            self.close_connection = True
            self.connection.close()
            return
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = 0, len(data) - 1
        if wanted := self.headers.get("Range"):
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end or last), last)
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if body:
            self.wfile.write(data[first : last + 1])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(root: Path) -> Iterator[Any]:
    made: Any = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root / "lines")))
    made.asked, made.limit = 0, 10**9
    made.handle_error = lambda *_: None
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.mark.parametrize("size", [1, 2])
def test_a_server_that_dies_and_comes_back(
    root: Path, converted: Callable[[str], Path], server: Any, tmp_path: Path, size: int
) -> None:
    """The run stops with a checkpoint and one line; resumed, it comes to the weights of a run that nothing stopped."""
    urls = [f"http://127.0.0.1:{server.server_port}/{number}.jsonl" for number in range(7)]
    recipe = ranks.write_recipe(tmp_path / "recipe.toml", converted("qwen3"), urls[0], streamed=True, save_every=50)
    text = recipe.read_text()
    recipe.write_text(text + "".join(f'\n[[data.streams]]\npath = "{url}"\n' for url in urls[1:]))
    ranks.run(recipe, tmp_path / "whole", ranks=size)
    server.limit = server.asked * 3 // 4  # of as many again
    server.asked = 0
    lines = ranks.run(recipe, tmp_path / "run", ranks=size, ok=False)
    (error,) = ranks.errors(lines)
    assert f"http://127.0.0.1:{server.server_port}/" in error and "was out of reach for 3 s" in error
    step = int(error.split("; step ")[1].split()[0])
    assert 0 < step < 20 and error.endswith(f"step {step} is saved, go on with --resume")
    assert (tmp_path / "run" / "latest").resolve().name == f"step-{step:08d}"
    assert any("is out of reach" in line and "trying again in 1 s" in line for line in lines)
    server.limit = 10**9
    ranks.run(recipe, tmp_path / "run", "--resume", ranks=size)
    assert same_weights(tmp_path / "run" / "model", tmp_path / "whole" / "model")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
