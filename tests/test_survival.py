"""What a run survives: kills, a full disk, a second run; and two ranks that equal one process."""
import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import faults
import pytest
import torch
import yaml

import train as training
from conftest import REPOSITORY, write_map_encoder, write_swin
from configs.files import read_checkpoint, write_whole
from data import read_studies
from evaluate import write_reports
from model import join_ranks, load_checkpoint, ranks


def assert_same_run(whole, other):
    """To the bit: every tensor of the checkpoints, every logged step, every prediction."""
    assert faults.difference(other, whole) is None


def at(config, folder):
    return replace(config, train=replace(config.train, output=str(folder)))


def test_a_killed_run_ends_as_an_undisturbed_one(make_config, tmp_path):
    """Three times at a random line; dropout and drop-path on, a save at every second step."""
    config = make_config("train.epochs=2", "train.save_every_steps=2", "train.lr=0.01")
    case = faults.undisturbed(at(config, tmp_path / "whole"), tmp_path / "output.txt")
    often = {place: min(times, 3) for place, times in case.lines.items()}  # in a rest, too
    case = replace(case, random=random.Random(1), config=at(config, tmp_path / "killed"),
                   lines=often)
    kills = [case.signalled(signal.SIGKILL) for _ in range(3)]
    assert sum(ended.code == -signal.SIGKILL for ended in kills) >= 2
    assert faults.judge(case, kills) == ("resumed", "")


def test_a_kill_between_last_and_best(make_config, tmp_path, monkeypatch):
    """last.pt is then one validation ahead of best.pt; that validation is made again."""
    config, write = make_config("train.epochs=2", "train.save_every_steps=2"), training.write_whole

    def killed(path, content):
        if path.name == "best.pt" and content["step"] == 8:
            raise KeyboardInterrupt
        write(path, content)
    monkeypatch.setattr(training, "score", lambda *a, **k: {"BLEU_4": 1.0, "CIDEr": 1.0})
    training.train(at(config, tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "write_whole", killed)
        training.train(at(config, tmp_path / "killed"))
    assert read_checkpoint(tmp_path / "killed/last.pt")["step"] == 8
    assert read_checkpoint(tmp_path / "killed/best.pt")["step"] == 4
    training.train(at(config, tmp_path / "killed"), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_ctrl_c_ends_in_one_line(make_config, tmp_path):
    """A terminal sends it to the loader's workers, too."""
    config = make_config("train.epochs=4000", "generate.max_new_tokens=2", "data.num_workers=2",
                         "train.save_every_steps=1")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.to_dict()))
    process = subprocess.Popen(
        [sys.executable, "train.py", "--config", str(tmp_path / "run.yaml")], cwd=REPOSITORY,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    log, end = tmp_path / "run/log.jsonl", time.monotonic() + 120
    while not (log.exists() and '"step": 2,' in log.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert "--resume" in errors.strip().splitlines()[-1]
    assert read_checkpoint(tmp_path / "run/last.pt")["step"] >= 1


def test_a_second_run_into_the_same_folder_is_refused(make_config, tmp_path):
    """While the first one stands still in its last evaluation."""
    config = make_config("train.max_steps=2", "train.save_every_steps=1")

    def stop_before_the_results():
        evaluate = training.evaluate

        def stopping(*args, **more):
            os.kill(os.getpid(), signal.SIGSTOP)
            return evaluate(*args, **more)
        training.evaluate = stopping
    first = faults.fork(config, tmp_path / "first.txt", stop_before_the_results)
    os.waitpid(first, os.WUNTRACED)
    log = (tmp_path / "run/log.jsonl").read_bytes()
    try:
        with pytest.raises(ValueError, match="another process"):
            training.train(config, resume=True)
    finally:
        os.kill(first, signal.SIGCONT)
    assert faults.wait(first, tmp_path / "first.txt").code == 0
    assert (tmp_path / "run/log.jsonl").read_bytes().startswith(log)


@pytest.mark.parametrize("reason", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_of(make_config, monkeypatch, capsys, reason):
    """Lustre and NFS may have none: a run goes on."""
    def lockf(*_):
        raise OSError(reason, os.strerror(reason))
    monkeypatch.setattr("fcntl.lockf", lockf)
    assert training.train(make_config("train.max_steps=1"))["n"] == 5
    assert f"no locks ({os.strerror(reason)})" in capsys.readouterr().out


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    write_whole(path, {"step": 1})
    before = path.read_bytes()

    def full(content, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="last.pt .*No space left"):
        write_whole(path, {"step": 2})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# Several ranks ------------------------------------------------------------------------------------

def run_ranks(config, folder, world=2):
    """Run a config as torchrun does, each rank a fork of this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def join(rank):
        os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        join_ranks()
    outputs = [folder / f"rank{rank}.txt" for rank in range(world)]
    started = [faults.fork(config, output, lambda rank=rank: join(rank))
               for rank, output in enumerate(outputs)]
    ended = [faults.wait(pid, output) for pid, output in zip(started, outputs)]
    assert not any(rank.code for rank in ended), "\n".join(rank.errors for rank in ended)


def edit_annotation(data_root, root, edit):
    """A copy of the tiny data whose annotation `edit` has changed."""
    shutil.copytree(data_root, root)
    tree = json.loads((root / "annotation.json").read_text())
    edit(tree)
    (root / "annotation.json").write_text(json.dumps(tree))
    return root


needs_cpus = pytest.mark.skipif(torch.cuda.is_available(), reason="forks cannot share a GPU")


@needs_cpus
def test_two_ranks_equal_one_process(make_config, data_root, tmp_path, monkeypatch):
    """8 + 8 against 16 studies: losses, gradient norms, weights of ten steps; and predictions:
    5 and 3 studies in batches of 2 do not divide by 2 ranks. Without drop-path and dropout, which
    are each rank's own."""
    def four_times(tree):
        tree["train"] = [study | {"id": f"{study['id']}_{i}"}
                         for i in range(4) for study in tree["train"]]
    root = edit_annotation(data_root, tmp_path / "data", four_times)
    write_swin(tmp_path / "swin")
    settings = json.loads((tmp_path / "swin/config.json").read_text())
    (tmp_path / "swin/config.json").write_text(json.dumps(settings | {"drop_path_rate": 0.0}))
    config = make_config(
        f"model.vision={tmp_path / 'swin'}", f"data.root={root}", "model.lora.dropout=0",
        "train.batch_size=16", "train.epochs=4", "train.max_steps=10", "train.lr=1.0e-3",
        "loss.vse_temperature=0.5", "loss.did_temperature=0.5", "loss.vse_weight=0.5")
    training.train(at(config, tmp_path / "one"))
    run_ranks(at(config, tmp_path / "two"), tmp_path)
    one, two = (faults.steps_of(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 14  # ten steps, four validations
    for ours, theirs in zip(one, two):
        for key in {"report", "vse", "did", "total", "gradient_norm", "did_top1"} & ours.keys():
            assert theirs[key] == pytest.approx(ours[key], abs=1e-5, rel=1e-5), (key, ours["step"])
    a, b = (read_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two"))
    assert all(torch.allclose(a["model"][key], b["model"][key], atol=1e-4) for key in a["model"])
    texts = [(tmp_path / name / "test_predictions.jsonl").read_bytes() for name in ("one", "two")]
    assert texts[0] == texts[1]


@needs_cpus
def test_two_ranks_validate_by_the_batchnorm_of_best(make_config, tmp_path, monkeypatch):
    """A11: each rank's BatchNorm has seen other films, and a checkpoint keeps the first one's. h of
    the last validation is that of one process with best.pt."""
    write_map_encoder("ResNet", tmp_path / "vision")
    config = make_config(f"model.vision={tmp_path / 'vision'}", "train.batch_size=4",
                         "train.eval_batch_size=1")

    def keeping(model, studies):
        reports, h = write_reports(model, studies)
        if not ranks()[0]:
            torch.save(h, tmp_path / "h.pt")
        return reports, h
    monkeypatch.setattr(training, "write_reports", keeping)
    run_ranks(config, tmp_path)
    _, alone = write_reports(load_checkpoint(tmp_path / "run/best.pt"),
                             read_studies(config.data)["val"])
    of_two = torch.load(tmp_path / "h.pt")
    assert of_two.keys() == alone.keys() and len(alone) == 3
    for name, h in alone.items():
        assert torch.allclose(torch.tensor(of_two[name]), torch.tensor(h), atol=1e-4)


def test_ranks_share_a_batch_equally(make_config, monkeypatch):
    monkeypatch.setattr(training, "ranks", lambda: (0, 2))
    with pytest.raises(ValueError, match="3 studies cannot be shared by 2 ranks"):
        training.train(make_config("train.batch_size=3"))
