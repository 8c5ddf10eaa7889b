"""The file of machine speeds: processes agree, whatever they measured, and whatever is in the file."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch

from zipvl_compile.report import machine_file as module
from zipvl_compile.report.known_machines import CPU
from zipvl_compile.report.machine_file import Entry, Key, NoPlace, agree, key_of, path, read, rounded

KEY = Key("chip", "", "AVX2", 2, 1, "float32", "2.13.0", "3.9.0")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("ZIPVL_CACHE_DIR", str(tmp_path))
    return tmp_path


def measured(site):
    return lambda: Entry(dataclasses.replace(CPU, site=site), module.today())


def never():
    raise AssertionError("measured")


def test_what_the_file_says_wins_over_what_was_just_measured():
    first = agree(KEY, measured(1.0))
    assert agree(KEY, never) == read(KEY) == first and first.speed.site == 1
    assert agree(KEY, measured(2.0), renew=True).speed.site == read(KEY).speed.site == 2


@pytest.mark.parametrize(
    "change", [{"device": "b"}, {"threads": 2}, {"dtype": "bfloat16"}, {"torch": "2.12.0"}, {"triton": "4"}]
)
def test_every_part_of_the_key_counts(change):
    other = dataclasses.replace(KEY, **change)
    agree(KEY, measured(1.0))
    assert agree(other, measured(2.0)).speed.site == 2 and read(KEY).speed.site == 1


def test_what_was_measured_in_another_way_stays_and_does_not_count():
    old = dataclasses.replace(KEY, measuring=module.MEASURING + 1)
    agree(KEY, measured(1.0))
    row = json.loads(path().read_text())["machines"][0] | {"measuring": old.measuring, "new": 1}
    path().write_text(json.dumps({"machines": [row]}))
    assert read(KEY) is None and agree(KEY, measured(3.0)).speed.site == 3
    assert json.loads(path().read_text())["machines"][0] == row


@pytest.mark.parametrize("attend", [0, -1, float("nan"), float("inf"), None, "x"])
def test_numbers_that_are_no_speed_are_measured_anew(caplog, attend):
    agree(KEY, measured(1.0))
    text = path().read_text().replace(str(CPU.attend), json.dumps(attend))
    path().write_text(text)
    assert agree(KEY, measured(2.0)).speed.site == 2 and len(caplog.records) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"machines": 3}', '{"machines": [{}]}', "null", "\0"])
def test_a_broken_file_is_measured_anew_with_one_warning(caplog, text):
    path().write_text(text)
    with caplog.at_level(logging.WARNING, "zipvl_compile"):
        assert agree(KEY, measured(1.0)).speed.site == 1
    assert len(caplog.records) == 1 and "measures anew" in caplog.text and str(path()) in caplog.text
    assert agree(KEY, never).speed.site == 1


def test_a_part_of_a_file_is_measured_anew(caplog):
    agree(KEY, measured(1.0))
    path().write_text(path().read_text()[:100])
    assert agree(KEY, measured(2.0)).speed.site == 2 and "measures anew" in caplog.text


def test_nothing_but_the_file_and_its_lock_is_left(folder):
    agree(KEY, measured(1.0))
    agree(KEY, measured(2.0), renew=True)
    assert sorted(one.name for one in folder.iterdir()) == ["machines.json", "machines.json.lock"]
    assert path().stat().st_mode & 0o444 == 0o444, "others may read it"


def test_those_who_start_at_once_measure_once():
    started, measured_sites, answers = threading.Barrier(4), [], []

    def slow(site):
        measured_sites.append(site)
        threading.Event().wait(0.2)
        return measured(site)()

    def one(site):
        started.wait()
        answers.append(agree(KEY, lambda: slow(site)))

    threads = [threading.Thread(target=one, args=(float(site),)) for site in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(measured_sites) == 1 and len(set(answers)) == 1 and len(answers) == 4


def test_another_process_waits_and_reads(folder):
    """It starts while this one measures, and would measure something else."""
    script = (
        "import dataclasses; from zipvl_compile.report.machine_file import *; from zipvl_compile.report.known_machines "
        "import CPU; print('here', flush=True); key = Key('chip', '', 'AVX2', 2, 1, 'float32', '2.13.0', '3.9.0'); "
        "print(agree(key, lambda: Entry(dataclasses.replace(CPU, site=9.0), '')).speed.site)"
    )
    started = []

    def slow():
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ)
        assert process.stdout.readline() == "here\n"
        started.append(process)
        threading.Event().wait(0.5)
        assert process.poll() is None, "it waits"
        return measured(1.0)()

    assert agree(KEY, slow).speed.site == 1
    assert started[0].communicate(timeout=120)[0].split() == ["1.0"]


def test_no_place_is_said_before_anything_is_measured(monkeypatch, folder):
    (folder / "file").touch()
    monkeypatch.setenv("ZIPVL_CACHE_DIR", str(folder / "file"))
    with pytest.raises(NoPlace, match="cannot be written"):
        agree(KEY, never)


def test_a_lock_that_nobody_gives_back_is_no_place(monkeypatch):
    monkeypatch.setattr(module, "WAIT", 0.05)
    with module._locked(), pytest.raises(NoPlace, match="cannot be written"):
        agree(KEY, never)


def test_where_the_file_is(monkeypatch, folder):
    assert path() == folder / "machines.json"
    monkeypatch.delenv("ZIPVL_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    assert path() == folder / "cache" / "zipvl" / "machines.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(folder))
    assert path() == folder / ".cache" / "zipvl" / "machines.json"


def test_the_key_of_this_machine(monkeypatch):
    here = key_of(torch.device("cpu"), torch.float32)
    assert here.device and here.threads == torch.get_num_threads() and here.torch == torch.__version__
    assert f"{here.cores} cores, {here.threads} threads, float32" in str(here)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    there = key_of(torch.device("cuda", 1), torch.bfloat16)
    assert (there.device, there.host, there.capability, there.threads) == ("card", here.device, "9.0", 0)
    assert there == key_of(torch.device("cuda", 0), torch.bfloat16), "cards of one kind share a speed"


@pytest.mark.parametrize("value", [1.0, 1.5, 3e-11, 7.3e-5, 1.8e-3, 9e-3, 123.0])
def test_numbers_are_rounded_to_two_binary_digits(value):
    got = rounded(dataclasses.replace(CPU, site=value)).site
    assert 2 / 3 < got / value < 1.5
    mantissa = got / 2.0 ** torch.tensor(got).log2().floor().item()
    assert mantissa in (1.0, 1.5)
    assert rounded(dataclasses.replace(CPU, site=got)).site == got


def test_nothing_stays_nothing():
    assert rounded(dataclasses.replace(CPU, site=0.0)).site == 0
