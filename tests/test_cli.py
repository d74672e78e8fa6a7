"""The command line: what it prints, its exit codes, and that it starts quickly."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from tidar import cli
from tidar.cli import main
from tidar.config import SamplingParams

FIELDS = {"prompt_tokens", "text", "token_ids", "finish_reason", "forwards", "tokens_per_forward"}
SECONDS = 0.5  # of CPU time, the most that starting may take


@pytest.fixture(scope="module")
def folder(converted: Callable[[str], Path]) -> str:
    return str(converted("llama"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_plain("llama", tmp_path_factory.mktemp("plain") / "plain"))


def answers(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main(words) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def cpu_seconds(*words: str) -> float:
    """CPU time of a child process, the least of three: a busy machine adds to it, nothing takes from it."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(3))


@pytest.mark.parametrize("words", [("-m", "tidar", "--help"), ("-m", "tidar", "train", "smoke", "--help")])
def test_help_is_quick(words: tuple[str, ...]) -> None:
    assert cpu_seconds(*words) < SECONDS


def test_import_is_quick() -> None:
    assert cpu_seconds("-c", "import tidar") < SECONDS
    heavy = "import sys, tidar, tidar.cli; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", heavy], check=True)


@pytest.mark.parametrize("command", ["demo", "generate", "chat", "convert", "train", "info"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert f"usage: tidar {command}" in capsys.readouterr().out


def test_json_is_the_library_s_answer(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", folder, "--prompt", "def f(x):", "--json", "--max-new-tokens", "12"]
    sampling = ["--temperature", "0.8", "--top-p", "0.9", "--top-k", "40", "--seed", "5", "--repetition-penalty", "1.2"]
    [ar] = answers(capsys, *words, *sampling, "--method", "ar")
    [fast] = answers(capsys, *words, *sampling, "--method", "tidar", "--draft-len", "4", "--proposals", "3")
    assert set(ar) == set(fast) == FIELDS
    assert ar["token_ids"] == fast["token_ids"]
    assert ar["forwards"] == len(ar["token_ids"])
    params = SamplingParams(max_new_tokens=12, temperature=0.8, top_p=0.9, top_k=40, seed=5, repetition_penalty=1.2)
    [expected] = cli.Checkpoint(model=folder).load().generate("def f(x):", params, draft_len=4, proposals=3)
    assert fast == {**vars(expected), "tokens_per_forward": expected.tokens_per_forward}


def test_text_streams_what_json_holds(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", folder, "--prompt", "def", "--max-new-tokens", "9", "--temperature", "1"]
    [answer] = answers(capsys, *words, "--json")
    assert main(words) == 0
    assert capsys.readouterr().out == answer["text"] + "\n"
    stop = answer["text"][3:5]
    [stopped] = answers(capsys, *words, "--json", "--stop", "absent", stop)
    assert stopped["text"] == answer["text"][: answer["text"].find(stop)]
    assert stopped["finish_reason"] == "stop"


def test_prompt_file_keeps_its_order(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["a much longer prompt than the others\n", "b", 'with "quotes" and ü']
    lines = "".join(json.dumps(p) + "\n" for p in prompts)
    (tmp_path / "prompts.jsonl").write_text(lines)
    words = ["generate", "--model", folder, "--max-new-tokens", "6"]
    from_file = answers(capsys, *words, "--prompt-file", str(tmp_path / "prompts.jsonl"))
    assert [a["prompt_tokens"] for a in from_file] == [len(p.encode()) for p in prompts]
    assert from_file == [answers(capsys, *words, "--json", "--prompt", p)[0] for p in prompts]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert answers(capsys, *words, "--prompt-file", "-") == from_file


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate"], "give either --prompt TEXT or --prompt-file FILE"),
        (["generate", "--prompt", "a", "--prompt-file", "b"], "give either --prompt TEXT or --prompt-file FILE"),
        (["generate", "--prompt-file", "no-such-file"], "cannot read no-such-file: No such file"),
        (["generate", "--prompt", "a", "--model", "./no-such-folder"], "no checkpoint at ./no-such-folder"),
        (["generate", "--prompt", "a", "--model", "FOLDER", "--device", "abacus"], "device 'abacus' is not available"),
        (["generate", "--prompt", "a", "--model", "FOLDER", "--dtype", "int3"], "dtype 'int3' is unknown"),
        (["generate", "--prompt", "", "--model", "FOLDER"], "the prompt is empty"),
        (["generate", "--prompt", "x" * 600, "--model", "FOLDER"], "shorten it"),
        (["generate", "--prompt", "a", "--model", "FOLDER", "--draft-len", "0"], "draft length must be at least 1"),
        (["generate", "--prompt", "a", "--model", "FOLDER", "--draft-len", "2", "--proposals", "3"], "between 1 and"),
        (["generate", "--prompt", "a", "--model", "FOLDER", "--draft-len", "2", "--proposals", "0"], "between 1 and"),
        (["generate", "--prompt", "a", "--model", "FOLDER", "--beta", "1.5"], "beta must lie in [0, 1]"),
        (["generate", "--prompt", "a", "--temperature", "-1"], "temperature must be"),
        (["generate", "--prompt", "a", "--top-p", "0"], "top_p must lie in (0, 1]"),
        (["generate", "--prompt", "a", "--top-p", "1.5"], "top_p must lie in (0, 1]"),
        (["generate", "--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["generate", "--prompt", "a", "--model", "PLAIN"], "tidar convert"),
        (["demo", "--model", "PLAIN"], "tidar convert"),
        (["convert", "./no-such-folder", "out"], "no checkpoint at ./no-such-folder"),
        (["train", "no-such-recipe"], "unknown recipe 'no-such-recipe'"),
        (["train", "smoke", "--lr", "-1"], "lr"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    words: list[str], said: str, folder: str, plain: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([{"FOLDER": folder, "PLAIN": plain}.get(w, w) for w in words]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("tidar: error: ")
    assert err.count("\n") == 1
    assert said in err
    assert words[0] == "demo" or not out


def test_hub_without_network_is_one_line() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "tidar", "generate", "--model", "nobody/nothing", "--prompt", "a"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert (child.returncode, child.stdout, child.stderr.count("\n")) == (2, "", 1)
    assert child.stderr.startswith("tidar: error: cannot fetch 'nobody/nothing'")


@pytest.mark.parametrize("words", [["generate", "--no-such-flag"], ["generate", "--seed", "x"], ["fly"], [], ["train"]])
def test_a_mistyped_command_is_exit_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 2
    assert "--help" in capsys.readouterr().err


@pytest.mark.parametrize("line", [b"no quotes", b"{}", b"", b'"\xff"', b'"cut'])
def test_a_bad_line_of_a_prompt_file_is_named(
    line: bytes, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'"good"\n' + line + b"\n")
    assert main(["generate", "--model", folder, "--prompt-file", str(path)]) == 2
    assert f"{path}:2: not a JSON string" in capsys.readouterr().err


def test_plain_checkpoint_decodes_ar(plain: str, capsys: pytest.CaptureFixture[str]) -> None:
    [answer] = answers(
        capsys, "generate", "--model", plain, "--prompt", "a", "--method", "ar", "--json", "--max-new-tokens", "3"
    )
    assert len(answer["token_ids"]) == answer["forwards"] == 3


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", folder, "--prompt", "a", "--draft-len", "17", "--max-new-tokens", "2"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("tidar: warning: draft length 17 is beyond the 16")
    assert err.count("\n") == 1


def test_interrupt_is_exit_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Info, "run", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr() == ("", "")


def test_interrupt_of_a_running_process(folder: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "tidar", "demo", "--model", folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        text=True,
        # A shell's background jobs ignore the signal, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert child.stdout is not None
    assert child.stdout.readline(), "the model is loaded and running"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "")


@pytest.mark.parametrize("words", [["info"], ["generate", "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_pipe_is_quiet(words: list[str], unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    child = subprocess.run([sys.executable, "-m", "tidar", *words], stdout=write, stderr=subprocess.PIPE, env=env)
    os.close(write)
    assert child.stderr == b""
    assert child.returncode == 141


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    [found] = answers(capsys, "info", "--json")
    assert {"tidar", "python", "torch", "transformers", "devices", "checkpoint", "checkpoint_spec"} <= set(found)
    assert "cpu" in found["devices"]
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert found["torch"] in text
    assert found["checkpoint"] in text


@pytest.mark.filterwarnings("default")
def test_convert_then_generate(plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "converted"
    assert main(["convert", plain, str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert main(["generate", "--model", str(out), "--prompt", "a", "--draft-len", "2", "--max-new-tokens", "2"]) == 0
    assert "not trained" in capsys.readouterr().err
    assert main(["convert", plain, str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_train_overrides_a_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tidar.train import trainer

    seen: list[Any] = []

    def train(config: Any, **options: Any) -> trainer.Result:
        seen.append((config, options))
        return trainer.Result(None, 0, 0)

    monkeypatch.setattr(trainer, "train", train)
    words = ["--lr", "0.01", "--arch.layers", "2", "--block-sizes", "2", "4", "--out", str(tmp_path), "--resume"]
    assert main(["train", "smoke", *words]) == 0
    [(config, options)] = seen
    assert (config.lr, config.arch.layers, config.block_sizes, config.out) == (0.01, 2, (2, 4), str(tmp_path))
    assert config.seq_len == 128, "the recipe's"
    assert options == {"resume": True, "continue_from": ""}


def test_info_of_a_broken_checkpoint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tidar.info.embedded_checkpoint", lambda: tmp_path)
    for text in (None, "{", "[]"):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        [found] = answers(capsys, "info", "--json")
        assert found["checkpoint_spec"] is None
