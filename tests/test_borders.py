"Whatever is odd in a file that is read gets one sentence which names it; nothing is deleted or written over."
import errno, json, math, os, random, shutil, struct
from contextlib import closing
from pathlib import Path

import pytest
import torch
from payloads import made
from safetensors.torch import load_file, save_file
from said import sentence

from sae_nb.acts import Store, Stream, write_store
from sae_nb.cli import main
from sae_nb.compute import read_curves
from sae_nb.core import Estimate, UserError, digest, to_json
from sae_nb.features import Payload, _sealed, read_openai, write_payload
from sae_nb.lm import load_lm
from sae_nb.report import curves, thin
from sae_nb.runs import RunConfig, left_out, read_steps, run, run_config, runs_table
from sae_nb.sae import SAE
from sae_nb.scaling import fit_law
from sae_nb.suite import STAGES, Evaluation
from sae_nb.sweep import is_done, write_table
from sae_nb.text import load_text
from sae_nb.widgets.explorer import Explorer, read_notes


@pytest.fixture(scope="module")
def lm(): return load_lm("pylib-64", "cpu", "float32")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    "A run of eight steps on a small text, with a store of its activations."
    folder, g = tmp_path_factory.mktemp("text"), random.Random(0)
    (folder / "t.txt").write_text(" ".join(g.choice(["def", "return", "x", "=", "(", ")", "+", "self", "\n"]) for _ in range(9_000)))
    return RunConfig(lm="pylib-64", text=str(folder / "t.txt"), site="resid_post.2", n=64, k=4, tokens=1_024, batch=128, context=64, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def kept(cfg, lm, tmp_path_factory):
    "One of each kind of file that is kept: a finished run, one half done, a store, an evaluation, features, and a saved model."
    folder = tmp_path_factory.mktemp("kept")
    list(run(cfg, folder / "run", lm=lm))
    (folder / "run/metrics.json").write_text(json.dumps(dict(nmse=.5, ce_recovered=.9, dead_fraction=0.)))
    with closing(run(cfg, folder / "half", lm=lm)) as steps: next(steps); next(steps)
    write_store(folder / "store", stream(cfg, lm), 2_000)
    Evaluation({"nmse": Estimate.of([[1., 2.], [2., 3.]])}, {"tokens": 5}, {"downstream": 1.}).save(folder / "measured/evaluation.json")
    made(folder / "features", 6, shard=3)
    (folder / "features/notes.json").write_text('{"1": "a note"}')
    lm.model.save_pretrained(folder / "lm")
    lm.tokenizer.save_pretrained(folder / "lm")
    return folder


def stream(cfg, lm): return Stream(lm, load_text(cfg.text), cfg.site, 64, 1_024)
def contents(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def opened(folder):
    "An explorer of all that is in a folder of features."
    payload = Payload.open(folder)
    for i in range(len(payload)): payload.feature(i)
    return Explorer(payload)


def go_on(folder, cfg, lm):
    with closing(run(cfg, folder, resume=True, lm=lm)) as steps: next(steps)


# file → what reads it
READ = {
    "run/config.json": {"run_config": lambda f, cfg, lm: run_config(f / "run"), "runs_table": lambda f, cfg, lm: repr(runs_table(f)),
                        "write_table": lambda f, cfg, lm: write_table(f / "run"), "is_done": lambda f, cfg, lm: is_done(f / "run", cfg)},
    "half/config.json": {"resume": lambda f, cfg, lm: go_on(f / "half", cfg, lm)},
    "run/cfg.json": {"load": lambda f, cfg, lm: SAE.load(f / "run")},
    "run/metrics.json": {"runs_table": lambda f, cfg, lm: repr(runs_table(f))},
    "store/store.json": {"read": lambda f, cfg, lm: next(Store.open(f / "store").blocks()).read(),
                         "write": lambda f, cfg, lm: write_store(f / "store", stream(cfg, lm), 2_000)},
    "measured/evaluation.json": {"load": lambda f, cfg, lm: repr(Evaluation.load(f / "measured/evaluation.json"))},
    "features/index.json": {"open": lambda f, cfg, lm: opened(f / "features"), "write": lambda f, cfg, lm: write_payload(f / "features", {}, [])},
    "features/shards/00001.json": {"open": lambda f, cfg, lm: opened(f / "features")},
    "features/notes.json": {"read": lambda f, cfg, lm: read_notes(f / "features"), "open": lambda f, cfg, lm: Explorer(Payload.open(f / "features"))},
    "lm/config.json": {"load": lambda f, cfg, lm: load_lm(f / "lm", "cpu", "float32")},
    "lm/tokenizer.json": {"load": lambda f, cfg, lm: load_lm(f / "lm", "cpu", "float32")},
    "lm/tokenizer_config.json": {"load": lambda f, cfg, lm: load_lm(f / "lm", "cpu", "float32")},
}
WAYS = [(name, way) for name, ways in READ.items() for way in ways]
DIGITS = "9" * 5_000   # more than Python reads
TEXTS = {"empty": b"", "deep": b"[" * 100_000, "deep names": b'{"a":' * 100_000, "long number": b'{"run": ' + DIGITS.encode() + b"}", "not UTF-8": b"\xff\xfe{}",
         "list": b"[1]", "null": b"null", "number": b"3", "text": b'"run"', "zeros": bytes(4_096)}


@pytest.mark.parametrize("how", TEXTS)
@pytest.mark.parametrize("name, way", WAYS)
def test_a_file_that_is_something_else_is_a_sentence(kept, cfg, lm, tmp_path, name, way, how):
    "The sentence names the file, or the folder that it belongs to; no file is changed."
    top = name.split("/")[0]
    folder = shutil.copytree(kept / top, tmp_path / top)
    (tmp_path / name).write_bytes(TEXTS[how])
    before = contents(folder)
    said = sentence(lambda: READ[name][way](tmp_path, cfg, lm), str(folder), ": ")
    assert contents(folder) == before and len(said) < 1_000


def places(content, at=()) -> list:
    "The way to every value in `content`, of a list to its first two."
    if isinstance(content, dict): inner = list(content.items())
    else: inner = list(enumerate(content))[:2] if isinstance(content, list) else []
    return [(*at, k) for k, _ in inner] + [p for k, v in inner for p in places(v, (*at, k))]


def changed(content, at, f):
    "`content` with `f` of what stands at `at`; without an `f` that is taken out."
    out = content.copy()
    if len(at) > 1: out[at[0]] = changed(content[at[0]], at[1:], f)
    elif f: out[at[0]] = f(content[at[0]])
    else: del out[at[0]]
    return out


def as_float(x): return float(x) if type(x) is int else [x]


WRONG = {"gone": None, "null": lambda x: None, "text": lambda x: "many", "negative": lambda x: -3, "half": lambda x: 1.5, "float": as_float, "true": lambda x: True, "infinite": lambda x: math.inf,
         "NaN": lambda x: math.nan, "large": lambda x: 10**400, "list": lambda x: [], "names": lambda x: {}, "nested": lambda x: json.loads("[" * 150 + "]" * 150), "half a character": lambda x: "\ud800"}


def resealed(name, content, folder):
    "Write `content` as the file of that name, with digests that fit: only its values are wrong."
    if name == "features/index.json": content = _sealed(content) if "digest" in content else content
    if name == "measured/evaluation.json" and content.pop("digest", None): content["digest"] = digest(to_json(content))
    (folder / name).write_text(json.dumps(content))
    if name == "features/shards/00001.json":
        index = json.loads((folder / "features/index.json").read_text())
        index["shards"][1] = digest((folder / name).read_bytes())
        (folder / "features/index.json").write_text(to_json(_sealed(index)))


def cases(name, content):
    "Every place with every wrong value, of what takes long to read a part."
    every = [(at, how) for at in places(content) for how in WRONG]
    few = {"half/config.json": 15, "run/config.json": 250, "store/store.json": 120, "features/index.json": 250, "lm/config.json": 12, "lm/tokenizer.json": 12, "lm/tokenizer_config.json": 12, "features/shards/00001.json": 250}
    return random.Random(0).sample(every, few[name]) if name in few and few[name] < len(every) else every


@pytest.mark.parametrize("name, way", WAYS)
def test_wrong_values_are_used_or_told(kept, cfg, lm, tmp_path, name, way):
    "Each value in turn: missing, of another type, or no number to reckon with. A sentence changes no file."
    top = name.split("/")[0]
    folder, content, told = shutil.copytree(kept / top, tmp_path / top), json.loads((kept / name).read_text()), 0
    for at, how in cases(name, content):
        resealed(name, changed(content, at, WRONG[how]), tmp_path)
        before = contents(folder)
        try: READ[name][way](tmp_path, cfg, lm)
        except UserError as e:
            assert "\n" not in str(e) and str(folder) in str(e), (at, how, str(e))
            assert contents(folder) == before, (at, how, str(e))
            told += 1
        except Exception as e: raise AssertionError(f"{at} {how}: {type(e).__name__} {e}") from e
        else:
            if contents(folder) != before: shutil.rmtree(folder); shutil.copytree(kept / top, folder)
    assert told or name in ("run/metrics.json", "lm/tokenizer_config.json")   # of these each value can be done without


@pytest.mark.parametrize("name, at, how", [
    ("store/store.json", ("shards", 0, "rows"), "large"), ("store/store.json", ("shards", 0, "rows"), "float"), ("store/store.json", ("shards", 0, "rows"), "negative"),
    ("measured/evaluation.json", ("metrics", "nmse", "nulls"), "null"), ("measured/evaluation.json", ("metrics", "nmse", "settings"), "list"),
    ("measured/evaluation.json", ("metrics", "nmse", "value"), "text"), ("measured/evaluation.json", ("seconds", "downstream"), "null"), ("measured/evaluation.json", ("metrics", "nmse", "low"), "gone"),
    ("features/index.json", ("n",), "large"), ("features/index.json", ("n",), "float"), ("features/index.json", ("rows",), "large"), ("features/index.json", ("shard",), "true"),
    ("features/index.json", ("bin",), "large"), ("features/index.json", ("context",), "text"), ("run/config.json", ("run", "n"), "half"), ("run/cfg.json", ("k",), "null"),
])
def test_a_wrong_value_is_told(kept, cfg, lm, tmp_path, name, at, how):
    top = name.split("/")[0]
    folder = shutil.copytree(kept / top, tmp_path / top)
    resealed(name, changed(json.loads((kept / name).read_text()), at, WRONG[how]), tmp_path)
    before = contents(folder)
    for way in READ[name]:
        if (name, way) != ("features/index.json", "write"): sentence(lambda way=way: READ[name][way](tmp_path, cfg, lm), str(folder), ": ")
    assert contents(folder) == before


def test_a_list_of_shards_with_another_number_of_rows_is_told(kept, tmp_path):
    "The file is whole, so the sentence is about store.json."
    folder = shutil.copytree(kept / "store", tmp_path / "store")
    content = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps(changed(content, ("shards", 0, "rows"), lambda rows: rows - 1)))
    sentence(lambda: Store.open(folder).read(0), "store.json", "shard-00000")


# --- headers -----------------------------------------------------------------------------------------

def with_header(path, header:bytes, size=None):
    "Exchange the header of a safetensors file."
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    path.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header + raw[8 + length:])


HEADERS = {**TEXTS, "nothing in it": b"{}", "metadata that are a list": b'{"__metadata__": [1]}', "a number in the metadata": b'{"__metadata__": {"sae": 3}}',
           "a tensor of null": b'{"rows": null}', "negative sizes": b'{"rows": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
           "large sizes": b'{"rows": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 4]}}', "another kind": b'{"rows": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}'}
FILES = {"half/checkpoint/state.safetensors": lambda f, cfg, lm: go_on(f / "half", cfg, lm), "run/sae.safetensors": lambda f, cfg, lm: SAE.load(f / "run"),
         "store/shard-00000.safetensors": lambda f, cfg, lm: Store.open(f / "store").read(0), "lm/model.safetensors": lambda f, cfg, lm: load_lm(f / "lm", "cpu", "float32")}


@pytest.mark.parametrize("how", HEADERS)
@pytest.mark.parametrize("name", FILES)
def test_an_odd_header_is_a_sentence(kept, cfg, lm, tmp_path, name, how):
    top = name.split("/")[0]
    folder = shutil.copytree(kept / top, tmp_path / top)
    for size in (None, 2**63, 2**64 - 1)[:3 if how == "empty" else 1]:
        with_header(tmp_path / name, HEADERS[how], size)
        before = contents(folder)
        sentence(lambda: FILES[name](tmp_path, cfg, lm), str(folder), ": ")
        assert contents(folder) == before


@pytest.mark.parametrize("part, value", [("step", torch.tensor(-1)), ("step", torch.tensor(10**9)), ("step", torch.tensor(math.nan)), ("step", torch.tensor(math.inf)),
                                         ("step", torch.tensor([1, 2])), ("scale", torch.tensor(math.nan)), ("scale", torch.tensor(math.inf)), ("scale", torch.ones(2))])
def test_a_whole_checkpoint_with_a_wrong_number_is_a_sentence(kept, cfg, lm, tmp_path, part, value):
    "Its digest fits; what it says cannot be."
    folder = shutil.copytree(kept / "half", tmp_path / "half")
    path = folder / "checkpoint/state.safetensors"
    tensors = load_file(path) | {part: value}
    save_file(tensors, path, metadata={"sha256": digest(tensors)})
    before = contents(folder)
    sentence(lambda: go_on(folder, cfg, lm), "checkpoint")
    assert contents(folder) == before


# --- steps, tables, files of others ------------------------------------------------------------------

def test_any_value_in_a_line_of_steps_is_passed_over_or_used(kept, cfg, lm, tmp_path):
    "What is left can be drawn, made into a table and gone on with."
    folder = shutil.copytree(kept / "half", tmp_path / "half")
    step = read_steps(folder)[0]
    lines = [json.dumps(changed(step, at, f)) for at in places(step) for f in WRONG.values()]
    log = folder / "steps.jsonl"
    log.write_bytes(b"\n".join([*TEXTS.values(), *map(str.encode, lines)]) + b"\n" + log.read_bytes())
    steps = read_steps(folder)
    assert len(curves(thin(steps))) == 2 and 10 < len(steps) < len(lines)
    assert left_out(folder) == 0
    go_on(folder, cfg, lm)


TABLES = {"curves": (read_curves, "model,flops,loss\nown,1e9,3\nown,1e10,2\n", ("own",)), "runs": (fit_law, "n,loss\n64,.5\n128,.4\n256,.3\n512,.25\n1024,.22\n", ())}
CELLS = ["", "many", "-3", "0", "nan", "inf", "1e400", "9" * 400, DIGITS, "[" * 200_000, "\0", "1,2,3,4", '"', "3\n1"]


@pytest.mark.parametrize("kind", TABLES)
def test_an_odd_table_is_a_sentence(tmp_path, kind):
    "Each number in turn is none, too large or more than one."
    read, text, more = TABLES[kind]
    path = tmp_path / "table.csv"
    path.write_text(text)
    read(path, *more)
    header, *lines = text.splitlines()
    for column in range(len(header.split(",")))[-2:]:
        for cell in CELLS:
            if header.endswith("flops,loss") and column == 2 and cell in ("-3", "0"): continue   # of a loss all that counts is by how much it falls
            cells = lines[1].split(",")
            cells[column] = cell
            path.write_text("\n".join([header, lines[0], ",".join(cells), *lines[2:]]))
            said = sentence(lambda: read(path, *more), ": ")
            assert "row" in said or str(path) in said, said
            assert len(said) < 500


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe", b"[" * 200_000, b"a,b,c\n1,2,3,4\n", b"flops,loss,model\n1,2\n", b"flops,loss,model\n1,2,other\n", b"{}", b"\0"])
def test_a_file_that_is_no_such_table_is_a_sentence(tmp_path, kind, content):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    read, _, more = TABLES[kind]
    said = sentence(lambda: read(path, *more), ": ")
    assert len(said) < 500


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.tsv", "t.parquet"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", DIGITS.encode(), b'{"text": ' + DIGITS.encode() + b"}", b"3", b"[1]", b"a\tb,c\n1,2,3\t4\t5\n", b"\0", b""])
def test_a_text_that_is_no_such_table_is_a_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    said = sentence(lambda: load_text(str(tmp_path / name)), ": ")
    assert str(tmp_path / name) in said or "row 0" in said


def sequence(): return dict(tokens=["a", "b"], acts=[0., 1.], idx=1, act=1., doc_id=3)


def test_any_value_in_a_file_of_openai_is_used_or_told(tmp_path):
    whole = dict(density=.1, mean_act=.2, mean_act_squared=.3, skew=1., kurtosis=2., hist={"0": 3, "1": 2}, top=[sequence()], random=[sequence()])
    path, told = tmp_path / "7.json", 0
    path.write_text(json.dumps(whole))
    assert read_openai(path).id == 7
    for at in places(whole):
        for how, f in WRONG.items():
            path.write_text(json.dumps(changed(whole, at, f)))
            try: repr(read_openai(path))
            except UserError as e: told += 1; assert "\n" not in str(e) and "7" in str(e)
            except Exception as e: raise AssertionError(f"{at} {how}: {type(e).__name__} {e}") from e
    assert told > 20
    for key in ("x", "1000000000000", DIGITS):
        path.write_text(json.dumps(whole | {"hist": {key: 1}}))
        sentence(lambda: read_openai(path), "7", ": ")


# --- a full memory, a full disk ----------------------------------------------------------------------

FULL = {"Python's": MemoryError(), "an accelerator's": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        "torch's": RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")}
TRAIN = ("train", "--lm", "pylib-64", "--site", "resid_post.2", "--n", "64", "--k", "4", "--tokens", "1024", "--batch", "128", "--context", "64", "--dtype", "float32", "--device", "cpu",
         "--eval-tokens", "256")


def fails(e):
    def f(*given, **named): raise e
    return f


def commands(folder, cfg):
    "What can be asked on the command line about copies of what is kept."
    return {"train": (*TRAIN, "--text", cfg.text, "--out", folder / "new"), "resume": (*TRAIN, "--text", cfg.text, "--out", folder / "half", "--resume"),
            "eval": ("eval", folder / "run", "--tokens", 256, "--device", "cpu"), "suite": ("eval", folder / "run", "--suite", "quick", "--device", "cpu"),
            "explore": ("explore", folder / "run", "--tokens", 512, "--explain", 2, "--no-browser", "--device", "cpu"),
            "export": ("export", folder / "run", "--tokens", 512, "--explain", 2, "--out", folder / "page.html", "--device", "cpu")}


@pytest.fixture
def copies(kept, tmp_path):
    for name in ("run", "half"): shutil.copytree(kept / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def says(capfd, monkeypatch):
    "Call the command; it must end with code 2 and one sentence, which is given back."
    monkeypatch.setattr("sae_nb.explore.find_spec", lambda name: True)   # whatever is installed
    def call(argv):
        capfd.readouterr()
        code = main(list(map(str, argv)))
        err = capfd.readouterr().err
        told = [line for line in err.replace("\r", "\n").split("\n") if line.startswith("sae-nb: ")]
        assert code == 2 and "Traceback" not in err and len(told) == 1 and err.rstrip().endswith(told[0]), err
        return told[0]
    return call


MEMORY = [(command, place) for place, names in {
    "sae_nb.lm.LM.read": "train resume eval suite explore export", "transformers.AutoModelForCausalLM.from_pretrained": "train resume eval suite explore export",
    "sae_nb.runs.init_": "train resume", "sae_nb.runs.train": "train resume", "sae_nb.sae.SAE.encode": "eval suite explore export", "safetensors.safe_open": "resume eval suite explore export",
    "sae_nb.train.State.load": "resume", "torch.Tensor.copy_": "resume", "sae_nb.runs.save_checkpoint": "train resume", "sae_nb.report.page": "eval", "json.loads": "eval explore"}.items() for command in names.split()]


@pytest.mark.parametrize("command, place, kind", [(*at, list(FULL)[i % 3]) for i, at in enumerate(MEMORY)] + [("resume", "sae_nb.runs.train", kind) for kind in FULL])
def test_a_full_memory_ends_a_command_with_a_sentence(copies, cfg, says, monkeypatch, command, place, kind):
    "Wherever it happens: the sentence speaks of memory, not of damage, and what was kept stands."
    before = contents(copies)
    with monkeypatch.context() as m:
        m.setattr(place, fails(FULL[kind]))
        said = says(commands(copies, cfg)[command])
    assert "memory" in said and "damaged" not in said and "train again" not in said, said
    after = contents(copies)
    assert all(after[p].startswith(before[p]) for p in before if p.name not in ("metrics.json", "report.html"))   # more steps may have been taken
    assert not [p for p in after if "sae_nb-tmp" in str(p)]


def full_disk(monkeypatch, of:str, after:int=0):
    "From now on files whose name holds `of` cannot be written to the end, but for the first `after`; gives what was tried."
    tries = []
    fsync = os.fsync
    def full(handle):
        name = Path(os.readlink(f"/proc/self/fd/{handle if isinstance(handle, int) else handle.fileno()}")).name
        if of in name: tries.append(name)
        if of in name and len(tries) > after: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)
    monkeypatch.setattr(os, "fsync", full)
    return tries


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")


@needs_proc
@pytest.mark.parametrize("command, name", [("train", "config.json"), ("train", "steps.jsonl"), ("train", "state.safetensors"), ("train", "sae.safetensors"), ("train", "metrics.json"), ("train", "report.html"),
                                           ("resume", "state.safetensors"), ("resume", "steps.jsonl"), ("resume", "cfg.json"), ("eval", "metrics.json"), ("eval", "report.html"),
                                           ("suite", "evaluation.partial.json"), ("explore", "index.json"), ("export", "index.json"), ("export", "windows.npy"), ("export", "page.html")])
def test_a_full_disk_ends_a_command_with_a_sentence(copies, cfg, says, monkeypatch, command, name):
    "The old file stands byte for byte, and nothing half written is left."
    monkeypatch.setattr("sae_nb.suite.STAGES", dict(list(STAGES.items())[:1]))
    before = contents(copies)
    with monkeypatch.context() as m:
        full_disk(m, name)
        said = says(commands(copies, cfg)[command])
    assert name in said and "No space left" in said, said
    after = contents(copies)
    assert {p: b for p, b in after.items() if p.name == name} == {p: b for p, b in before.items() if p.name == name}
    assert not [p for p in after if "sae_nb-tmp" in str(p)]


@needs_proc
@pytest.mark.parametrize("at", [0, 1])
def test_a_full_disk_under_the_checkpoint_of_a_resumed_run(kept, cfg, lm, tmp_path, monkeypatch, at):
    "The old checkpoint stands, and once there is room the run ends with the bits of the uninterrupted one; `at` checkpoints found room before."
    folder = shutil.copytree(kept / "half", tmp_path / "half")
    path = folder / "checkpoint/state.safetensors"
    old = [path.read_bytes()]
    with monkeypatch.context() as m:
        written = full_disk(m, "state.safetensors", after=at)
        def go():
            for _ in run(cfg, folder, resume=True, lm=lm, every=0.): old.append(path.read_bytes())
        sentence(go, "state.safetensors", "No space left")
    assert len(written) > at and path.read_bytes() == old[-1] and len(set(old)) == at + 1
    assert not [p for p in folder.rglob("*") if "sae_nb-tmp" in p.name]
    list(run(cfg, folder, resume=True, lm=lm))
    assert (folder / "sae.safetensors").read_bytes() == (kept / "run/sae.safetensors").read_bytes()
    taken = lambda at: [{k: v for k, v in s.items() if k not in ("rate", "waited", "took")} for s in read_steps(at)]
    assert taken(folder) == taken(kept / "run")
