"""Several writers and readers of one folder, writers that are killed, and full disks: whole states alone."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small import Classifier, loader, mlp, pretrained, trainer

import lora_lightning as ll
from lora_lightning.app.cli import main
from lora_lightning.errors import WriteError
from lora_lightning.files import pair as adapter_pair
from lora_lightning.files.locate import read_any
from lora_lightning.files.pair import CONFIG_FILE, TENSOR_FILE, read_pair
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.writers import MOVING, WRITING, workplace

FORMATS = ("lora_lightning", "peft")
fork = multiprocessing.get_context("fork")


def adapted(number=0, rank=2):
    """Updates that hold one number."""
    model = pretrained(mlp)
    ll.inject(model, ll.LoRAConfig(rank=rank, alpha=float(rank), modules_to_save=None))
    return filled(model, number)


def filled(model, number):
    with torch.no_grad():
        for parameter in ll.lora_parameters(model):
            parameter.fill_(number)
    return model


def number_in(folder):
    """Which save a folder holds; fails where it is of two."""
    (number,) = {x for t in read_any(folder).tensors.values() for x in t.unique().tolist()}
    return number


def files_in(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def in_a_process(work, *arguments):
    process = fork.Process(target=work, args=arguments)
    process.start()
    return process


def write_for(seconds, folder, numbers, format):
    model, end = adapted(), time.monotonic() + seconds
    while time.monotonic() < end:
        for number in numbers:
            ll.save_adapter(filled(model, number), folder, format=format)


def stress(folder, seconds, formats):
    """Two writers for each format, and this process reads: numbers seen, how often read."""
    ll.save_adapter(adapted(1), folder)
    writers = [
        in_a_process(write_for, seconds, folder, [2 * i + 1, 2 * i + 2], f) for i, f in enumerate(formats)
    ]
    seen, count = set(), 0
    while any(w.is_alive() for w in writers):
        seen.add(number_in(folder))
        count += 1
    assert not any(w.join() or w.exitcode for w in writers)
    assert files_in(folder) == [CONFIG_FILE, TENSOR_FILE]
    return seen, count


@pytest.mark.parametrize("seconds", [1.0, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("formats", [FORMATS[:1] * 2, FORMATS], ids=["ours", "mixed"])
def test_readers_find_one_whole_save_while_others_write(seconds, formats, tmp_path):
    seen, count = stress(tmp_path / "x", seconds, formats)
    assert len(seen) > 1 and count > 10
    number_in(tmp_path / "x")


def test_the_last_of_two_writers_wins(tmp_path):
    """Threads of one process, too, come one after the other; here the first begins and ends late."""
    with workplace(tmp_path) as place:
        ll.save_adapter(adapted(2), tmp_path)
        assert number_in(tmp_path) == 2 and place.is_dir()
    ll.save_adapter(adapted(3), tmp_path)
    assert number_in(tmp_path) == 3
    assert files_in(tmp_path) == [CONFIG_FILE, TENSOR_FILE]


@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupt_between_the_two_files_leaves_the_new_state(format, tmp_path, monkeypatch):
    ll.save_adapter(adapted(1), tmp_path, format=format)
    replace = os.replace

    def interrupted(source, target):
        if CONFIG_FILE in str(target):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ll.save_adapter(adapted(2, rank=3), tmp_path, format=format)
    monkeypatch.undo()
    assert number_in(tmp_path) == 2
    assert [p.split("-")[1] for p in files_in(tmp_path)[:1]] == ["moving"]
    write_whole(tmp_path / "other", lambda name: Path(name).touch())  # any next writer finishes
    assert files_in(tmp_path) == [CONFIG_FILE, TENSOR_FILE, "other"]
    assert number_in(tmp_path) == 2


def killed(at, folder):
    """A writer that the system kills where it would rename one of its files, or fill one."""

    def die(*arguments, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    if at == "filling":
        adapter_pair.save_file = lambda tensors, path, metadata: (save_file(tensors, path, metadata), die())
    else:
        replace = os.replace
        os.replace = lambda a, b: die() if at in str(b) else replace(a, b)
    ll.save_adapter(adapted(2, rank=3), folder)


@pytest.mark.parametrize(("at", "left"), [("filling", 1), (TENSOR_FILE, 1), (CONFIG_FILE, 2)])
def test_what_a_killed_writer_has_left_is_settled_by_the_next(at, left, tmp_path):
    ll.save_adapter(adapted(1), tmp_path)
    process = in_a_process(killed, at, tmp_path)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(files_in(tmp_path)) == 3
    assert number_in(tmp_path) == left
    ll.save_adapter(adapted(3), tmp_path)
    assert files_in(tmp_path) == [CONFIG_FILE, TENSOR_FILE]
    assert number_in(tmp_path) == 3


def wait_within(folder, begun, go_on):
    def write(name):
        Path(name).write_text("whole")
        begun.set()
        go_on.wait()

    write_whole(folder / "slow", write)


def test_what_a_living_writer_makes_is_left_alone(tmp_path):
    begun, go_on = fork.Event(), fork.Event()
    process = in_a_process(wait_within, tmp_path, begun, go_on)
    begun.wait()
    for name in "ab":
        write_whole(tmp_path / name, lambda path: Path(path).touch())
    assert [p.startswith(WRITING) for p in files_in(tmp_path)] == [True, False, False]
    go_on.set()
    process.join()
    assert process.exitcode == 0 and files_in(tmp_path) == ["a", "b", "slow"]


def test_two_saves_copied_together_are_refused(tmp_path):
    """No writer is under way, so that nothing else belongs to either file."""
    for format in FORMATS:
        one, two = tmp_path / f"{format}1", tmp_path / f"{format}2"
        ll.save_adapter(adapted(1), one, format=format)
        ll.save_adapter(adapted(2, rank=3), two, format=format)
        (one / CONFIG_FILE).write_bytes((two / CONFIG_FILE).read_bytes())
        with pytest.raises(ll.AdapterFileError, match=r"two different saves|of another save"):
            read_any(one)


def test_a_folder_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_lightning.utils.writers.fcntl", None)
    ll.save_adapter(adapted(1), tmp_path)
    (tmp_path / f"{MOVING}0").mkdir()
    ll.save_adapter(adapted(2), tmp_path)
    assert number_in(tmp_path) == 2 and files_in(tmp_path)[1:] == [CONFIG_FILE, TENSOR_FILE]


def answer_of(work, size, answers):
    """What happens where no file may be larger than so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        work()
        answers.put("done")
    except SystemExit as end:
        answers.put(f"exit {end.code}")
    except BaseException as error:
        answers.put(f"{type(error).__name__}: {error}")


def on_a_full_disk(work, size=2000):
    answers = fork.SimpleQueue()
    process = in_a_process(answer_of, work, size, answers)
    answer = answers.get()
    process.join()
    return answer


def test_a_full_disk_gives_one_message_and_leaves_what_was_there(tmp_path, capfd):
    module, data = Classifier(), loader()
    run = trainer(tmp_path, ll.LoRACallback(rank=2, verbose=False), max_epochs=1, enable_checkpointing=False)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "x.ckpt")
    save_file(
        {n: t.contiguous() for n, t in pretrained(mlp).state_dict().items()}, tmp_path / "b.safetensors"
    )
    ll.save_adapter(adapted(1), tmp_path / "a")
    (tmp_path / "out.safetensors").write_text("old")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    words = [f"ckpt={tmp_path / 'a'}", f"base={tmp_path / 'b.safetensors'}", "overwrite=true"]
    works = {
        "a": lambda: ll.save_adapter(adapted(2), tmp_path / "a"),
        "a/": lambda: ll.save_adapter(adapted(2), tmp_path / "a", format="peft"),
        "x.ckpt": lambda: run.save_checkpoint(tmp_path / "x.ckpt"),
        "out.safetensors": lambda: main(["merge", f"out={tmp_path / 'out.safetensors'}", *words]),
    }
    for name, work in works.items():
        answer = on_a_full_disk(work, 500)
        told = capfd.readouterr().err if answer == "exit 2" else answer.removeprefix("WriteError: ")
        assert f"cannot be written: {os.strerror(errno.EFBIG)}. Make room" in told, (name, told)
        assert str(tmp_path / name.rstrip("/")) in told and "Traceback" not in told and told.count("\n") <= 1
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        assert not list(tmp_path.rglob(".*"))


def test_an_error_of_writing_is_the_systems_and_ours(tmp_path):
    """Whoever catches OSError, as before, finds its number."""
    with pytest.raises(OSError, match=r"no/x cannot be written: No such file or directory\.") as caught:
        write_whole(tmp_path / "no" / "x", lambda name: None)
    assert isinstance(caught.value, WriteError) and caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(
    "change", [{"lora_alpha": 7}, {"r": 3}, {"use_rslora": True}, {"modules_to_save": ["5"]}]
)
def test_an_edited_configuration_in_pefts_format_is_refused(change, tmp_path):
    ll.save_adapter(adapted(1), tmp_path, format="peft")
    path = tmp_path / CONFIG_FILE
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "base_model_name_or_path": "mine", "corda_config": None}))
    assert number_in(tmp_path) == 1  # what people and PEFT fill in
    path.write_text(json.dumps({**about, **change}))
    with pytest.raises(ll.AdapterFileError, match=f"{CONFIG_FILE} is damaged, was edited, or"):
        read_any(tmp_path)
    _, tensors, metadata = read_pair(tmp_path)
    save_file(tensors, tmp_path / TENSOR_FILE, {k: v for k, v in metadata.items() if k != "sha256"})
    with pytest.raises(ll.AdapterFileError, match="does not match its checksum"):
        read_any(tmp_path)
