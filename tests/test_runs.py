"A run folder says what it was made from, and only that run goes on in it."
import json, os, shutil
from pathlib import Path

import pytest
import torch
from sae_nb.core import UserError, read_json
from sae_nb.lm import load_lm
from sae_nb.runs import RunConfig, located, open_run, run, run_subject, save_checkpoint
from sae_nb.sae import SAE
from sae_nb.text import load_text

WORDS = "one two three four five six seven eight nine ten alpha beta gamma delta".split()


def sentence(f, *words):
    "The one sentence that `f` raises; it must hold `words`."
    with pytest.raises(UserError) as told: f()
    assert "\n" not in str(told.value)
    for word in words: assert word in str(told.value)
    return str(told.value)


@pytest.fixture
def text(tmp_path):
    "A file with some thousand words."
    g = torch.Generator().manual_seed(0)
    path = tmp_path / "notes.txt"
    path.write_text("\n".join(" ".join(WORDS[i] for i in torch.randint(len(WORDS), (12,), generator=g)) for _ in range(600)))
    return path


@pytest.fixture(scope="module")
def lm(): return load_lm("pylib-64", "cpu", "float32")


def config(text, **more):
    return RunConfig(**{**dict(lm="pylib-64", text=str(text), site="resid_post.1", n=64, k=4, tokens=2_048, context=32, device="cpu", dtype="float32"), **more})


def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_a_path_means_the_same_from_everywhere(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = config("notes.txt", store="kept")
    assert cfg.text == str(text) and cfg.store == str(tmp_path / "kept")
    assert located("pylib") == "pylib" and located("pylib-64") == "pylib-64" and located("owner/name") == "owner/name"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert located("~/notes.txt") == str(text)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert RunConfig.from_dict(cfg.to_dict()) == cfg


def test_a_run_does_not_go_on_with_another_text(text, lm, tmp_path):
    folder = tmp_path / "run"
    for step in run(config(text), folder, lm=lm):
        if step.step == 3: break
    before = files(folder)
    text.write_text(text.read_text().replace("alpha", "omega", 1))
    sentence(lambda: next(run(config(text), folder, resume=True, lm=lm)), "text digest", str(folder))
    assert files(folder) == before


def test_a_run_does_not_go_on_with_another_model(text, tmp_path):
    other = load_lm("pylib-64", "cpu", "float32")
    folder = tmp_path / "run"
    for step in run(config(text), folder, lm=other):
        if step.step == 3: break
    changed = load_lm("pylib-64", "cpu", "float32")
    with torch.no_grad(): next(changed.model.parameters())[5, 5] += 1
    sentence(lambda: next(run(config(text), folder, resume=True, lm=changed)), "lm digest")


def test_the_subject_of_a_run_is_found_from_everywhere_or_asked_for(text, lm, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    list(run(config("notes.txt"), folder, lm=lm))
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    (tmp_path / "away/notes.txt").write_text("another text " * 900)
    assert run_subject(folder)[2] is True
    assert run_subject(folder, text="notes.txt")[2] is False
    text.rename(tmp_path / "moved.txt")
    sentence(lambda: run_subject(folder), "notes.txt")
    assert run_subject(folder, text=str(tmp_path / "moved.txt"))[2] is True
    (tmp_path / "moved.txt").rename(text)
    text.write_text(text.read_text() + "\nmore\n")
    sentence(lambda: run_subject(folder), "changed since", "--text")
    sentence(lambda: run_subject(folder, lm="pylib-128"), "pylib-128", "--lm")


@pytest.mark.parametrize("held", ["other.json", "config.json"])
def test_a_refused_folder_keeps_everything(text, tmp_path, held):
    folder = tmp_path / "mine"
    (folder / "checkpoint").mkdir(parents=True)
    for name in (held, ".notes.tmp", ".draft.1.sae_nb-tmp", "checkpoint/.a.tmp"): (folder / name).write_text('{"a": 1}')
    before = files(folder)
    sentence(lambda: open_run(folder, config(text), True), "holds other files")
    assert files(folder) == before


def test_a_checkpoint_that_is_a_link_is_not_swept(text, lm, tmp_path):
    folder, foreign = tmp_path / "run", tmp_path / "foreign"
    list(run(config(text), folder, lm=lm))
    shutil.rmtree(folder / "checkpoint")
    foreign.mkdir()
    (foreign / ".x.999999999.sae_nb-tmp").write_text("kept")
    (folder / "checkpoint").symlink_to(foreign)
    for step in run(config(text), folder, resume=True, lm=lm): break
    assert (foreign / ".x.999999999.sae_nb-tmp").exists()


def test_a_run_that_cannot_fit_leaves_nothing(text, lm, tmp_path):
    sentence(lambda: next(run(config(text, n=10**11), tmp_path / "run", lm=lm)), "GB")
    assert not (tmp_path / "run").exists()


def test_a_run_below_its_text_is_refused(lm, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("some words here\n" * 2_000)
    sentence(lambda: next(run(config(notes), notes / "runs/first", lm=lm)), "another folder")
    assert not (notes / "runs").exists()
    (tmp_path / "link").symlink_to(notes)
    sentence(lambda: next(run(config(notes), tmp_path / "link/run", lm=lm)), "another folder")


def test_a_folder_removed_in_mid_run_is_told(text, lm, tmp_path):
    folder = tmp_path / "run"
    def going():
        for step in run(config(text), folder, lm=lm, every=0.):
            if step.step == 2: shutil.rmtree(folder)
    sentence(going, "removed")
    assert not (folder / "sae.safetensors").exists()


def test_two_at_once_is_one_sentence(text, lm, tmp_path):
    first = run(config(text), tmp_path / "run", lm=lm)
    next(first)
    sentence(lambda: next(run(config(text), tmp_path / "run", resume=True, lm=lm)), "in use")
    first.close()
    list(run(config(text), tmp_path / "run", resume=True, lm=lm))
    assert SAE.load(tmp_path / "run").cfg.n == 64


def test_more_tokens_are_another_run(text, lm, tmp_path):
    list(run(config(text), tmp_path / "run", lm=lm))
    sentence(lambda: next(run(config(text, tokens=4_096), tmp_path / "run", resume=True, lm=lm)), "2,048", "4,096", "another folder")


def test_everything_written_is_strict_json(text, lm, tmp_path):
    list(run(config(text), tmp_path / "run", lm=lm))
    def refuse(word): raise AssertionError(word)
    for name in ("config.json", "cfg.json"): json.loads((tmp_path / "run" / name).read_text(), parse_constant=refuse)
    for line in (tmp_path / "run/steps.jsonl").read_text().splitlines(): json.loads(line, parse_constant=refuse)
    assert set(read_json(tmp_path / "run/config.json")["made of"]) == {"lm digest", "text digest"}
