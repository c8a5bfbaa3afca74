"""What a run survives: kills, signals, a full disk, a second run; and several ranks that equal
one process."""
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import train as training
from configs import report
from conftest import TIMING, write_map_encoder
from model import read_checkpoint

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def config_file(make_config, tmp_path):
    """config_file(name, ...): a YAML of the tiny run that writes into tmp_path / name."""
    def write(name, *overrides):
        config = make_config(f"train.output={tmp_path / name}", *overrides)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config.to_dict()))
        return path
    return write


def command(config, *arguments, ranks=1):
    start = (
        [sys.executable]
        if ranks == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(ranks),
        ]
    )
    return [*start, "train.py", "--config", str(config), *arguments]


def environment():
    # no Java: METEOR is not what is tested
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": "/nowhere"}


def run(config, *arguments, ranks=1, timeout=240):
    return subprocess.run(
        command(config, *arguments, ranks=ranks),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=timeout,
    )


def start(config, *arguments, ranks=1):
    return subprocess.Popen(
        command(config, *arguments, ranks=ranks),
        cwd=REPOSITORY,
        text=True,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def wait_for_step(process, folder, step, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        log = folder / "log.jsonl"
        if log.is_file() and f'"step": {step},' in log.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} did not come: {process.communicate()}")


def log_of(folder):
    return [
        {k: v for k, v in json.loads(line).items() if k not in TIMING}
        for line in (folder / "log.jsonl").read_text().splitlines()
    ][1:]


def assert_same_run(one, other):
    """Every tensor of both checkpoints, every logged step, every prediction."""
    for name in ("last.pt", "best.pt"):
        leaves = [
            torch.utils._pytree.tree_flatten(
                {k: v for k, v in read_checkpoint(folder / name).items() if k != "config"}
            )
            for folder in (one, other)
        ]
        assert leaves[0][1] == leaves[1][1]
        assert all(
            torch.equal(a, b) if torch.is_tensor(a) else a == b
            for a, b in zip(leaves[0][0], leaves[1][0])
        ), name
    assert log_of(one) == log_of(other)
    assert (one / "test_predictions.jsonl").read_bytes() == (
        other / "test_predictions.jsonl"
    ).read_bytes()


def kill_at_random_moments(config, folder, kills, seconds, rng):
    """SIGKILL `kills` times after a random time up to `seconds` of stepping, resume each time,
    and let the last one end."""
    moments = []
    for _ in range(kills):
        process = start(config, "--resume")
        end = time.monotonic() + 120
        while (
            process.poll() is None
            and time.monotonic() < end
            and not (folder / "log.jsonl").is_file()
        ):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, seconds))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        moments.append(
            (folder / "log.jsonl").read_text().count("\n")
            if (folder / "log.jsonl").is_file()
            else 0
        )
    done = run(config, "--resume")
    assert done.returncode == 0, done.stderr
    return moments


def test_killed_runs_end_as_an_undisturbed_one(config_file, tmp_path):
    """Dropout and drop-path on, a save at every second step, validation in each epoch."""
    settings = ("train.epochs=3", "train.save_every_steps=2", "train.lr=0.01")
    assert run(config_file("whole", *settings)).returncode == 0
    kill_at_random_moments(
        config_file("killed", *settings), tmp_path / "killed", 3, 6, random.Random(0)
    )
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.skipif(
    "VDGEN_SLOW" not in os.environ,
    reason="twenty kills of a demo run take a quarter of an hour: VDGEN_SLOW=1 runs them",
)
def test_twenty_kills_of_a_demo_run(tmp_path):
    settings = ("--set", "train.max_steps=250", "data.limit=400", "train.save_every_steps=1")
    for name in ("whole", "killed"):
        (tmp_path / f"{name}.yaml").write_text((REPOSITORY / "configs/demo.yaml").read_text())
    whole, killed = (
        [tmp_path / f"{name}.yaml", *settings, f"train.output={tmp_path / name}"]
        for name in ("whole", "killed")
    )
    done = run(*whole, timeout=900)
    assert done.returncode == 0, done.stderr
    rng = random.Random(0)
    log, moments = tmp_path / "killed/log.jsonl", []

    def lines():
        return log.read_text().count("\n") if log.is_file() else 0
    for _ in range(20):
        process, goal, end = (
            start(*killed, "--resume"),
            lines() + rng.randint(0, 20),
            time.monotonic() + rng.uniform(5, 60),
        )
        while process.poll() is None and lines() < goal and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        assert process.poll() is None, "it ended before its kill"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        moments.append(lines())
    print("log lines at each kill:", moments)
    assert run(*killed, "--resume", timeout=900).returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_finish_the_step_save_and_exit(config_file, tmp_path, number, code, workers):
    """Of the whole group of processes, as Ctrl-C in a terminal: a loader's workers get it, too."""
    # nothing is saved within an epoch
    settings = ("train.epochs=40", "train.max_steps=100", "generate.max_new_tokens=2",
                f"data.num_workers={workers}")
    process = start(config_file("run", *settings), ranks=1)
    wait_for_step(process, tmp_path / "run", 2)
    os.killpg(process.pid, number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors, errors
    steps = [line["step"] for line in log_of(tmp_path / "run") if "val" not in line]
    assert read_checkpoint(tmp_path / "run/last.pt")["step"] == steps[-1] < 100
    # at the end of an epoch all is saved
    assert f"stopped at step {steps[-1]}; --resume goes on" in out or steps[-1] % 4 == 0


@pytest.mark.parametrize("last", [4, 8])
def test_a_signal_while_the_end_of_an_epoch_is_saved(make_config, tmp_path, monkeypatch, last):
    """It ends the run before the validation, behind the last step of all, too."""
    config = make_config("train.epochs=2")
    saving = training.save

    def told(run, name):
        if (run.step, run.validated) == (last, False):
            os.kill(os.getpid(), signal.SIGTERM)
        saving(run, name)
    monkeypatch.setattr(training, "save", told)
    with pytest.raises(SystemExit) as ended:
        training.train(config)
    assert ended.value.code == 143
    lines = log_of(tmp_path / "run")
    assert lines[-1]["step"] == last and "val" not in lines[-1]
    kept = read_checkpoint(tmp_path / "run/last.pt")
    assert (kept["step"], kept["validated"]) == (last, False)


def test_a_run_that_ended_while_another_began_is_kept(make_config, tmp_path, monkeypatch):
    """The second looked for last.pt, read its model for a minute, and only then locks the log."""
    config, loading = make_config("train.max_steps=1"), training.load_model

    def meanwhile(config):
        monkeypatch.setattr(training, "load_model", loading)
        training.train(config)
        return loading(config)
    monkeypatch.setattr(training, "load_model", meanwhile)
    with pytest.raises(ValueError, match="another process has trained in this folder meanwhile"):
        training.train(config, resume=True)
    assert read_checkpoint(tmp_path / "run/last.pt")["step"] == 1
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 1]


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(training.fcntl, "lockf", none)
    words = "log.jsonl: cannot be locked .No locks available.; put train.output on"
    with pytest.raises(OSError, match=words):
        training.open_log(tmp_path / "log.jsonl", 0, True, None)


def test_a_second_run_into_the_same_folder_is_refused(config_file, tmp_path):
    config = config_file(
        "run", "train.epochs=1000", "train.max_steps=4000", "generate.max_new_tokens=2"
    )
    first = start(config)
    try:
        wait_for_step(first, tmp_path / "run", 1)
        log = (tmp_path / "run/log.jsonl").read_text()
        second = run(config, "--resume")
        assert (
            second.returncode == 1
            and "another process is training in this folder" in second.stderr
        )
        assert (
            second.stderr.strip().splitlines()[-1].startswith("error: ")
            and "Traceback" not in second.stderr
        )
        assert (tmp_path / "run/log.jsonl").read_text().startswith(log)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    training.write_atomically(path, {"step": 1})
    before = path.read_bytes()

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(training.torch, "save", full)
    with pytest.raises(
        OSError, match="cannot write .*last.pt .*No space left.*the one before it is whole"
    ):
        training.write_atomically(path, {"step": 2})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_results_before(tmp_path, monkeypatch):
    path = tmp_path / "test_metrics.json"
    report.write_whole(path, "{}")

    def full(path, text, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    words = "cannot write .*test_metrics.json .No space left on device.; make room"
    with pytest.raises(OSError, match=words):
        report.write_whole(path, '{"n": 1}')
    assert path.read_bytes() == b"{}" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_names_the_log():
    with open("/dev/full", "wb", buffering=0) as file:
        log = io.TextIOWrapper(file, write_through=True)
        words = ("cannot write /dev/full .No space left on device.; make room, and go on with "
                 "--resume")
        with pytest.raises(OSError, match=words):
            training.write_line(log, {"step": 1})
        log.detach()


def test_a_clock_that_stands_still_is_no_error(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(training.time, "perf_counter", lambda: 1e9)
    training.train(make_config("train.max_steps=1"))
    assert log_of(tmp_path / "run")[0]["step"] == 1


@pytest.mark.skipif("VDGEN_SLOW" not in os.environ,
                    reason="two runs for each of nine faults: VDGEN_SLOW=1 runs them")
def test_each_fault_once():
    done = subprocess.run([sys.executable, "tests/faults.py", "--runs", "9"], cwd=REPOSITORY,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_log_holds_each_step_once(tmp_path):
    """Half a line, steps behind the checkpoint, and a validation that counts only if the
    checkpoint knows it."""
    lines = [{"arguments": {}}, {"step": 1}, {"step": 2}, {"step": 2, "val": {}}, {"step": 3}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for step, validated, kept in (
        (2, True, 4),
        (2, False, 3),
        (1, True, 2),
        (3, True, 5),
        (0, True, 0),
    ):
        (tmp_path / "log.jsonl").write_text(text + '{"step": 4, "rep')
        with training.open_log(tmp_path / "log.jsonl", step, validated, None) as file:
            file.write('{"step": 9}\n')
        left = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert left == lines[:kept] + [{"step": 9}]


def test_validation_is_made_up_after_a_kill_within_it(make_config, tmp_path, monkeypatch):
    whole = make_config(f"train.output={tmp_path / 'whole'}", "train.epochs=2")
    training.train(whole)

    def killed(*args):
        raise KeyboardInterrupt
    config = make_config(f"train.output={tmp_path / 'killed'}", "train.epochs=2")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "validate", killed)
        training.train(config)
    assert read_checkpoint(tmp_path / "killed/last.pt")["validated"] is False
    training.train(config, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.fixture
def still_backbones(backbones, tmp_path):
    """The tiny Swin without drop-path, so that what differs between ranks is not chance."""
    from transformers import SwinModel
    swin = SwinModel.from_pretrained(backbones / "swin")
    swin.config.drop_path_rate = 0.0
    swin.save_pretrained(tmp_path / "swin")
    (tmp_path / "swin/preprocessor_config.json").write_text(
        (backbones / "swin/preprocessor_config.json").read_text()
    )
    return tmp_path / "swin"


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="each rank wants a GPU of its own")
def test_two_ranks_equal_one_process(config_file, still_backbones, data_root, tmp_path):
    """8 + 8 against 16 studies: losses, gradient norms, weights of ten steps; and predictions:
    5 and 3 studies in batches of 2 do not divide by 2 ranks."""
    shutil.copytree(data_root, tmp_path / "data")
    tree = json.loads((tmp_path / "data/annotation.json").read_text())
    tree["train"] = [
        study | {"id": f"{study['id']}_{i}"} for i in range(4) for study in tree["train"]
    ]
    (tmp_path / "data/annotation.json").write_text(json.dumps(tree))
    settings = (
        f"model.vision={still_backbones}",
        f"data.root={tmp_path / 'data'}",
        "model.lora.dropout=0",
        "train.batch_size=16",
        "train.epochs=4",
        "train.max_steps=10",
        "train.lr=1.0e-3",
        "loss.vse_temperature=0.5",
        "loss.did_temperature=0.5",
        "loss.vse_weight=0.5",
    )
    for name, ranks in (("one", 1), ("two", 2)):
        done = run(config_file(name, *settings), ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])["ranks"] == (
            ranks
        )
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(one) == len(two) == 14  # ten steps, four validations
    for ours, theirs in zip(one, two):
        for key in (
            "report",
            "vse",
            "did",
            "total",
            "gradient_norm",
            "pull_report",
            "pull_vse",
            "pull_did",
            "did_top1",
        ):
            if key in ours:
                assert theirs[key] == pytest.approx(ours[key], abs=1e-5, rel=1e-5), (
                    key,
                    ours["step"],
                )
    a, b = (read_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two"))
    assert (
        all(torch.allclose(a["model"][key], b["model"][key], atol=1e-4) for key in a["model"])
        and len(b["random"]) == 2
    )
    moved = max(
        (a["model"][key] - value).abs().max()
        for key, value in b["model"].items()
        if value.is_floating_point()
    )
    print(f"largest difference of a weight after ten steps: {moved:.1e}")
    assert (tmp_path / "one/test_predictions.jsonl").read_bytes() == (
        tmp_path / "two/test_predictions.jsonl"
    ).read_bytes()


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="each rank wants a GPU of its own")
def test_two_ranks_validate_by_the_batchnorm_of_best(config_file, data_root, tmp_path):
    """A11: each rank's BatchNorm has seen other films, and a checkpoint keeps the first one's. h of
    the last validation is that of one process, which evaluates best.pt again."""
    shutil.copytree(data_root, tmp_path / "data")
    tree = json.loads((tmp_path / "data/annotation.json").read_text())
    del tree["test"]  # what is evaluated at the end is then the last validation itself
    (tmp_path / "data/annotation.json").write_text(json.dumps(tree))
    write_map_encoder("ResNet", tmp_path / "vision")
    config = config_file(
        "run",
        f"model.vision={tmp_path / 'vision'}",
        f"data.root={tmp_path / 'data'}",
        "train.batch_size=4",
        "train.eval_batch_size=1",
        "train.epochs=1",
    )
    points = []
    for ranks, resume in ((2, []), (1, ["--resume"])):
        done = run(config, *resume, ranks=ranks)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "run/val_predictions.jsonl").read_text().splitlines()
        points.append(torch.tensor([json.loads(line)["visual_pca"] for line in lines]))
        (tmp_path / "run/val_predictions.jsonl").unlink()
    assert len(points[0]) == 3 and torch.allclose(*points, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="each rank wants a GPU of its own")
def test_ranks_share_the_batch_and_end_with_the_first_that_dies(config_file, tmp_path):
    done = run(config_file("odd", "train.batch_size=3"), ranks=2)
    assert done.returncode != 0 and "3 studies cannot be shared by 2 ranks equally" in done.stderr
    process = start(
        config_file(
            "run",
            "train.batch_size=4",
            "train.epochs=1000",
            "train.max_steps=4000",
            "generate.max_new_tokens=2",
        ),
        ranks=2,
    )
    try:
        wait_for_step(process, tmp_path / "run", 2)
        workers = [
            int(pid)
            for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]
        workers = [pid for pid in workers if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode != 0 and not any(Path(f"/proc/{pid}").exists() for pid in workers)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
