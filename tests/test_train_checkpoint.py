"""Checkpoints are whole or absent: a full disk, a kill while saving, a broken file."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from train_data import config, pack, same_weights, write_text

from tidar.checkpoint import load_model
from tidar.errors import TidarError
from tidar.model import CausalLM
from tidar.train import checkpoint
from tidar.train.checkpoint import Progress, newest_whole, read_progress, save_checkpoint, save_weights
from tidar.train.optimizer import make_optimizer
from tidar.train.step import Stepper
from tidar.train.trainer import train


@pytest.fixture(scope="module")
def stepper(converted: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Stepper:
    """A model with optimizer state."""
    folder = converted("llama")
    made = Stepper(load_model(folder), config(tmp_path_factory.mktemp("unused"), folder))
    made([pack([[24]])], 0, 1e-3)
    return made


def progress(step: int) -> Progress:
    return Progress(step, step * 96, 0, {"row": step * 6, "seed": 0, "tokens": 1000, "seq_len": 16})


def save(out: Path, stepper: Stepper, step: int, keep_last: int = 2) -> Path:
    return save_checkpoint(out, stepper.model, stepper.optimizer, progress(step), keep_last=keep_last)


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """As good as a full disk: a write past ``size`` bytes of a file fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_round_trip_and_the_last_n_are_kept(tmp_path: Path, stepper: Stepper) -> None:
    for step in (1, 2, 10):
        made = save(tmp_path, stepper, step)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000010", "step-00000002"]
    assert (tmp_path / "latest").resolve() == made.resolve()
    assert newest_whole(tmp_path, pytest.fail) == made
    assert read_progress(made) == progress(10)
    fresh: CausalLM = load_model(made / "model")
    for name, value in stepper.model.hf.state_dict().items():
        assert torch.equal(fresh.hf.state_dict()[name], value), name
    optimizer = make_optimizer(stepper.config, fresh)
    state = torch.get_rng_state()
    torch.rand(3)
    assert checkpoint.load_optimizer(made, optimizer)
    assert torch.equal(torch.get_rng_state(), state)
    parts = zip(stepper.optimizer.state_dict()["parts"], optimizer.state_dict()["parts"], strict=True)
    for old, new in parts:
        assert old["param_groups"] == new["param_groups"]
        assert len(old["state"]) == len(new["state"]) > 5
        for key, entry in old["state"].items():
            assert all(torch.equal(new["state"][key][name], value) for name, value in entry.items())


@pytest.mark.parametrize("size", [0, 500, 40_000, 120_000])
def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path: Path, stepper: Stepper, size: int) -> None:
    save(tmp_path, stepper, 1)
    before = files(tmp_path)
    with (
        files_no_larger_than(size),
        pytest.raises(TidarError, match="cannot save checkpoint step-00000002.*last whole.*step-00000001") as error,
    ):
        save(tmp_path, stepper, 2)
    assert "\n" not in str(error.value)
    assert files(tmp_path) == before
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert save(tmp_path, stepper, 2).exists()  # with room again, the run goes on


def test_sizes_of_the_full_disk_hit_every_file(tmp_path: Path, stepper: Stepper) -> None:
    """The limits above fail the first file, the weights, and the optimizer alone."""
    made = save(tmp_path, stepper, 1)
    weights = (made / "model" / "model.safetensors").stat().st_size
    optimizer = (made / "optimizer.pt").stat().st_size
    assert 40_000 < weights < 120_000 < optimizer


def test_a_full_disk_leaves_the_final_model_whole(tmp_path: Path, stepper: Stepper) -> None:
    save_weights(tmp_path / "model", stepper.model, progress(1), dtype="fp32")
    before = files(tmp_path)
    with files_no_larger_than(500), pytest.raises(TidarError):
        save_weights(tmp_path / "model", stepper.model, progress(2), dtype="fp32")
    assert files(tmp_path) == before
    save_weights(tmp_path / "model", stepper.model, progress(2), dtype="bf16")
    assert read_progress(tmp_path / "model").step == 2
    assert load_model(tmp_path / "model", dtype="auto").dtype == torch.bfloat16
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["optimizer.pt", "model/model.safetensors", "progress.json", "model/config.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_broken_checkpoint_is_reported_and_the_one_before_used(
    tmp_path: Path, stepper: Stepper, name: str, harm: str
) -> None:
    old, new = save(tmp_path, stepper, 1), save(tmp_path, stepper, 2)
    path = new / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(bytes(data) if harm == "flip" else bytes(data[:-1]))
    said: list[str] = []
    assert newest_whole(tmp_path, said.append) == old
    assert len(said) == 1
    assert str(new) in said[0]
    assert name.split("/")[-1] in said[0]
    again = save(tmp_path, stepper, 2)  # the run comes by again
    assert newest_whole(tmp_path, pytest.fail) == again


def test_nothing_whole_is_an_error(tmp_path: Path, stepper: Stepper) -> None:
    assert newest_whole(tmp_path, pytest.fail) is None
    (save(tmp_path, stepper, 1) / "manifest.json").write_text("{}}")
    with pytest.raises(TidarError, match="every checkpoint"):
        newest_whole(tmp_path, lambda _: None)


def test_what_a_kill_while_saving_left_is_no_checkpoint(tmp_path: Path, stepper: Stepper) -> None:
    old = save(tmp_path, stepper, 1)
    half = tmp_path / "checkpoints" / ".step-00000002.abc"
    half.mkdir()
    (half / "manifest.json").write_text("{}")
    assert newest_whole(tmp_path, pytest.fail) == old
    save(tmp_path, stepper, 3)
    assert not half.exists()


def test_a_run_goes_on_from_the_one_before_a_broken_one(
    tmp_path: Path, converted: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path / "text")
    plan = config(tmp_path, converted("llama"))
    train(plan)
    (tmp_path / "run" / "model").rename(tmp_path / "wanted")
    broken = tmp_path / "run" / "checkpoints" / "step-00000012"
    (broken / "optimizer.pt").write_bytes(b"")
    capsys.readouterr()
    train(plan, resume=True)
    assert f"checkpoint {broken} is broken (optimizer.pt has changed)" in capsys.readouterr().err
    assert same_weights(tmp_path / "run" / "model", tmp_path / "wanted")
