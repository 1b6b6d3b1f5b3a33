"Killed at any moment, a run ends with the same bits; a damaged file gets one sentence and costs nothing else."
import json, multiprocessing, random, shutil, signal, time
from dataclasses import replace

import pytest
import torch
from said import sentence

import sae_nb.acts
from sae_nb.acts import Store, Stream, batches, write_store
from sae_nb.core import UserError
from sae_nb.lm import load_lm
from sae_nb.runs import RunConfig, read_steps, run
from sae_nb.sae import SAE
from sae_nb.text import load_text


def words(seed=0, count=9_000):
    g = random.Random(seed)
    return " ".join(g.choice(["def", "return", "x", "y", "=", "(", ")", "+", "self", "import", "os", "1", "\n"]) for _ in range(count))


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    "A run of 160 steps on a small text."
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(words(), encoding="utf-8")
    return RunConfig(lm="pylib-64", text=str(path), site="resid_post.2", n=256, k=8, tokens=20_480, batch=128, context=64, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def lm(): return load_lm("pylib-64", "cpu", "float32")


@pytest.fixture(scope="module")
def whole(cfg, lm, tmp_path_factory):
    "The uninterrupted run; tests work on copies."
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert len(list(run(cfg, folder, lm=lm))) == 160
    return folder


def told(folder): return [{k: v for k, v in step.items() if k not in ("rate", "waited", "took")} for step in read_steps(folder)]


def contents(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same_run(folder, whole):
    "The same bits in the weights and the same steps, whatever the rate was."
    assert (folder / "sae.safetensors").read_bytes() == (whole / "sae.safetensors").read_bytes()
    assert (folder / "cfg.json").read_bytes() == (whole / "cfg.json").read_bytes()
    assert told(folder) == told(whole)


# --- killed ------------------------------------------------------------------------------------------

def work(cfg, folder, every):
    "What each process does: go on with the run until it ends or dies."
    torch.set_num_threads(1)
    for _ in run(RunConfig(**cfg), folder, resume=True, every=every): pass


def started(cfg, folder, every):
    "A process that works on the run; all come from one that has torch and transformers loaded already."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sae_nb.runs", "transformers.models.gpt2.modeling_gpt2"])
    process = context.Process(target=work, args=(cfg.to_dict(), folder, every), daemon=True)
    process.start()
    return process


def steps_in(folder):
    path = folder / "steps.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.skipif(not hasattr(signal, "SIGKILL") or "forkserver" not in multiprocessing.get_all_start_methods(), reason="needs SIGKILL and forkserver")
def test_killed_ten_times_it_ends_with_the_same_bits(cfg, tmp_path):
    "Ten SIGKILLs, some while loading, most at random steps and moments, often within the writing of a checkpoint."
    clean = started(cfg, tmp_path / "clean", 1e9)
    clean.join(120)
    assert clean.exitcode == 0
    chance, folder, killed, tries = random.Random(time.time_ns()), tmp_path / "killed", [], 0
    while len(killed) < 10 or sum(0 < steps < 160 for steps in killed) < 5:
        assert (tries := tries + 1) < 100, f"too few were killed while they trained: {killed}"
        process = started(cfg, folder, chance.choice([0., .02, .2]))
        if tries % 4 == 3: process.join(chance.uniform(0, 1))
        else:
            goal = steps_in(folder) + chance.randint(1, 12)
            while process.is_alive() and steps_in(folder) < goal: time.sleep(.002)
            time.sleep(chance.uniform(0, .03))
        process.kill(); process.join()
        if process.exitcode == -signal.SIGKILL: killed.append(steps_in(folder))
        else:   # a quick machine: it ended before it was killed, and another run is begun
            assert process.exitcode == 0
            assert_same_run(folder, tmp_path / "clean")
            folder = tmp_path / f"killed-{tries}"
    last = started(cfg, folder, .2)
    last.join(120)
    assert last.exitcode == 0
    assert_same_run(folder, tmp_path / "clean")


def test_what_a_killed_process_was_writing_is_cleared_away(cfg, lm, half, whole, tmp_path):
    "A half-written checkpoint is as large as a checkpoint; ten kills must not fill the disk."
    folder = shutil.copytree(half, tmp_path / "run")
    for name in (".steps.jsonl", "checkpoint/.state.safetensors"): (folder / f"{name}.999999999.sae_nb-tmp").write_bytes(bytes(1000))
    for _ in run(cfg, folder, resume=True, lm=lm): pass
    assert_same_run(folder, whole)
    assert not [p for p in folder.rglob("*") if p.name.endswith("tmp")]


@pytest.mark.parametrize("stop", [1, 50, 159, 160])
def test_stopped_by_its_reader_it_goes_on(cfg, lm, whole, tmp_path, stop):
    "Whoever breaks out of the loop may come back, after the last step too."
    for step in run(cfg, tmp_path / "run", lm=lm):
        if step.step == stop: break
    assert not (tmp_path / "run/sae.safetensors").exists()
    rest = list(run(cfg, tmp_path / "run", resume=True, lm=lm))
    assert [s.step for s in rest] == list(range(stop + 1, 161))
    assert_same_run(tmp_path / "run", whole)


def test_an_error_in_the_readers_loop_keeps_the_run(cfg, lm, whole, tmp_path):
    with pytest.raises(ZeroDivisionError):
        for step in run(cfg, tmp_path / "run", lm=lm):
            if step.step == 30: 1 / 0
    list(run(cfg, tmp_path / "run", resume=True, lm=lm))
    assert_same_run(tmp_path / "run", whole)


def test_steps_after_the_checkpoint_are_written_once(cfg, lm, whole, tmp_path):
    "Lines that the dead process wrote after its last checkpoint, the last one half, are made again."
    for step in run(cfg, tmp_path / "run", lm=lm):
        if step.step == 60: break
    with open(tmp_path / "run/steps.jsonl", "a") as f: f.write(json.dumps(read_steps(whole)[60]) + "\n" + '{"step": 62, "tok')
    list(run(cfg, tmp_path / "run", resume=True, lm=lm))
    assert_same_run(tmp_path / "run", whole)


def test_another_seed_gives_another_run(cfg, lm, whole, tmp_path):
    "The comparison can fail."
    list(run(replace(cfg, seed=1), tmp_path / "run", lm=lm))
    assert (tmp_path / "run/sae.safetensors").read_bytes() != (whole / "sae.safetensors").read_bytes() and told(tmp_path / "run") != told(whole)


# --- damaged -----------------------------------------------------------------------------------------

def flip(path, at):
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1 << 3
    path.write_bytes(data)


DAMAGE = {"truncated": lambda p: p.write_bytes(p.read_bytes()[:-100]), "cut to the header": lambda p: p.write_bytes(p.read_bytes()[:50]), "emptied": lambda p: p.write_bytes(b""),
          "length flipped": lambda p: flip(p, 0), "header flipped": lambda p: flip(p, .0005), "early bit flipped": lambda p: flip(p, .1), "middle bit flipped": lambda p: flip(p, .5), "last bit flipped": lambda p: flip(p, 1)}
every_damage = pytest.mark.parametrize("how", DAMAGE)


@pytest.fixture(scope="module")
def half(cfg, lm, tmp_path_factory):
    "A run that was stopped at step 40."
    folder = tmp_path_factory.mktemp("runs") / "half"
    for step in run(cfg, folder, lm=lm):
        if step.step == 40: break
    return folder


@every_damage
def test_damaged_checkpoint(cfg, lm, half, tmp_path, how):
    folder = shutil.copytree(half, tmp_path / "run")
    DAMAGE[how](folder / "checkpoint/state.safetensors")
    before = contents(folder)
    sentence(lambda: next(run(cfg, folder, resume=True, lm=lm)), "state.safetensors", "damaged")
    assert contents(folder) == before


def test_a_deleted_checkpoint_starts_again(cfg, lm, half, whole, tmp_path):
    folder = shutil.copytree(half, tmp_path / "run")
    (folder / "checkpoint/state.safetensors").unlink()
    assert next(iter(list(run(cfg, folder, resume=True, lm=lm)))).step == 1
    assert_same_run(folder, whole)


@pytest.mark.parametrize("change", ["dtype", "shape", "missing"])
def test_a_checkpoint_that_is_whole_but_of_something_else(cfg, lm, half, tmp_path, change):
    "Tensors with other types or shapes, or too few, are told and not used, though the file is readable."
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    folder = shutil.copytree(half, tmp_path / "run")
    path = folder / "checkpoint/state.safetensors"
    with safe_open(path, "pt") as f: meta = f.metadata()
    tensors = load_file(path)
    if change == "dtype": tensors["sae.W_enc"] = tensors["sae.W_enc"].view(torch.int32)
    if change == "shape": tensors["sae.W_enc"] = tensors["sae.W_enc"].reshape(64, 256)
    if change == "missing": del tensors["average.W_dec"]
    save_file(tensors, path, metadata=meta)
    before = contents(folder)
    sentence(lambda: next(run(cfg, folder, resume=True, lm=lm)), "checkpoint")
    assert contents(folder) == before


@pytest.mark.parametrize("name, content", [("config.json", b"{"), ("config.json", b"[]"), ("config.json", b"null"), ("config.json", b"{}"), ("config.json", b"\xff\xfe")])
def test_damaged_config(cfg, lm, half, tmp_path, name, content):
    folder = shutil.copytree(half, tmp_path / "run")
    (folder / name).write_bytes(content)
    before = contents(folder)
    sentence(lambda: next(run(cfg, folder, resume=True, lm=lm)))
    assert contents(folder) == before


@pytest.mark.parametrize("bad", [b"\xff\xfe\n", b"5\n", b"null\n", b"{}\n", b"[1]\n"])
def test_a_damaged_line_in_the_log_ends_nothing(cfg, lm, half, tmp_path, bad):
    "A line that is none is left out, or told in one sentence."
    folder = shutil.copytree(half, tmp_path / "run")
    with open(folder / "steps.jsonl", "ab") as f: f.write(bad)
    try: rest = list(run(cfg, folder, resume=True, lm=lm))
    except UserError as e: assert "steps.jsonl" in str(e)
    else: assert rest[-1].step == 160 and [s["step"] for s in told(folder)] == list(range(1, 161))


@every_damage
def test_damaged_weights(whole, tmp_path, how):
    "Whatever the damage, it is told: what safetensors does not see, the checksum does."
    folder = shutil.copytree(whole, tmp_path / "run")
    DAMAGE[how](folder / "sae.safetensors")
    sentence(lambda: SAE.load(folder), "sae.safetensors")


# --- stores ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stream(cfg, lm): return Stream(lm, load_text(cfg.text), cfg.site, 64, 1_900, forward=1_024)


@pytest.fixture(scope="module")
def stored(stream, tmp_path_factory):
    "A store of four shards; tests work on copies."
    folder = tmp_path_factory.mktemp("stores") / "four"
    assert len(write_store(folder, stream, 7_500).shards) == 4
    return folder


@pytest.fixture
def reads(monkeypatch):
    "Counts how often the model is read."
    calls, real = [], sae_nb.acts.read_rows
    monkeypatch.setattr(sae_nb.acts, "read_rows", lambda *a: (calls.append(1), real(*a))[1])
    return calls


@every_damage
def test_damaged_shard_is_told_and_repaired_alone(stored, stream, tmp_path, reads, how):
    "One sentence; the other shards stay; after deleting the file only its rows are read again."
    folder = shutil.copytree(stored, tmp_path / "store")
    shard, intact = folder / "shard-00002.safetensors", contents(folder)
    DAMAGE[how](shard)
    store = Store.open(folder)
    sentence(lambda: store.read(2), "shard-00002.safetensors")
    sentence(lambda: list(zip(range(60), batches(store.blocks(), 128))), "shard-00002.safetensors")
    assert {p: b for p, b in contents(folder).items() if "00002" not in p.name} == {p: b for p, b in intact.items() if "00002" not in p.name}
    for i in (0, 1, 3): assert len(store.read(i)) == store.shards[i]["rows"]
    shard.unlink()
    stamps = {p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*")}
    reads.clear()
    write_store(folder, stream, 7_500)
    assert contents(folder) == intact
    assert len(reads) == 2 and {p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*") if p != shard} == stamps


def test_a_whole_store_is_not_read_again(stored, stream, tmp_path, reads):
    folder = shutil.copytree(stored, tmp_path / "store")
    write_store(folder, stream, 7_500)
    assert not reads
    assert len(write_store(folder, stream, 9_000).shards) == 5 and 2 <= len(reads) <= 3


def test_a_store_stopped_in_the_middle_goes_on(stored, stream, tmp_path):
    "Stopped after two shards, one of them not yet listed, it ends with the same bytes."
    folder = tmp_path / "store"
    write_store(folder, stream, 3_500)
    shutil.copy(stored / "shard-00002.safetensors", folder)
    write_store(folder, stream, 7_500)
    assert contents(folder) == contents(stored)


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b"null", b"", b"\xff"])
def test_damaged_list_of_shards(stored, tmp_path, content):
    folder = shutil.copytree(stored, tmp_path / "store")
    (folder / "store.json").write_bytes(content)
    sentence(lambda: Store.open(folder), str(folder))


def test_a_store_of_other_rows_is_refused(stored, stream, lm, cfg, tmp_path):
    "Another context, site, text or precision of the model is another store."
    folder = shutil.copytree(stored, tmp_path / "store")
    half = load_lm("pylib-64", "cpu", "bfloat16")
    taken = []
    for name, other in dict(context=32, site="resid_post.1", block_rows=1_024, lm=half, held_out=True, text=load_text("pylib")).items():
        try: write_store(folder, replace(stream, **{name: other}), 7_500); taken.append(name)
        except UserError as e: assert "other activations" in str(e)
    assert not taken, f"the store was taken for one with another {taken}"
    assert contents(folder) == contents(stored)


def test_a_store_deals_the_batches_of_its_stream(stored, stream):
    "From disk or from the model: the same rows in the same order."
    pairs = list(zip(range(40), batches(stream.blocks(), 128, seed=5), batches(Store.open(stored).blocks(), 128, seed=5)))
    assert len(pairs) == 40 and all(torch.equal(a, b) for _, a, b in pairs)


def stored_run(cfg, lm, folder, store, stop=None):
    "A run that keeps its activations in `store`."
    for step in run(replace(cfg, store=str(store)), folder, resume=True, lm=lm):
        if step.step == stop: break


def test_runs_share_a_store(cfg, lm, tmp_path, reads):
    "The first run writes the store; the second, and one that is stopped and resumed, only read it, and end the same."
    stored_run(cfg, lm, tmp_path / "first", tmp_path / "store")
    store, once = contents(tmp_path / "store"), len(reads)
    stored_run(cfg, lm, tmp_path / "second", tmp_path / "store")
    assert len(reads) - once < once / 2   # the sample and the held-out rows
    stored_run(cfg, lm, tmp_path / "third", tmp_path / "store", stop=70)
    stored_run(cfg, lm, tmp_path / "third", tmp_path / "store")
    for name in ("second", "third"): assert_same_run(tmp_path / name, tmp_path / "first")
    assert contents(tmp_path / "store") == store
