"A run folder says what it was made from, and only that run goes on in it."
import csv, errno, json, os, shutil, warnings
from contextlib import closing
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from said import sentence

import sae_nb.acts
import sae_nb.runs
from sae_nb.acts import Stream
from sae_nb.core import digest, pick_device, read_json
from sae_nb.lm import load_lm
from sae_nb.runs import RunConfig, Source, differing, left_out, located, open_run, read_steps, recipe, run, run_config, run_subject
from sae_nb.sae import SAE
from sae_nb.train import TrainConfig

WORDS = "one two three four five six seven eight nine ten alpha beta gamma delta".split()


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


def test_two_at_once_is_sentence(text, lm, tmp_path):
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


# --- which text, and how it is read ---------------------------------------------------------------------

def notes(path, columns=("ask", "answer")):
    "A table with a column for each name, of other words; columns of one name are the same everywhere."
    g = torch.Generator().manual_seed(1)
    draw = lambda some: " ".join(some[i] for i in torch.randint(len(some), (30,), generator=g))
    rows = [{"ask": draw(WORDS[:7]), "answer": draw(WORDS[7:])} for _ in range(500)]
    with open(path, "w", newline="") as f:
        out = csv.DictWriter(f, columns, extrasaction="ignore")
        out.writeheader(); out.writerows(rows)
    return path


def trained(cfg, folder, lm=None):
    "The bits that a run ends with."
    list(run(cfg, folder, lm=lm))
    return (folder / "sae.safetensors").read_bytes()


def digests(folder): return read_json(folder / "config.json")["made of"]


def test_a_table_is_trained_on_and_measured_by_its_column(lm, tmp_path):
    both, only = notes(tmp_path / "both.csv"), notes(tmp_path / "only.csv", ["answer"])
    ask, answer = (trained(config(both, column=c), tmp_path / c, lm) for c in ("ask", "answer"))
    assert answer == trained(config(only), tmp_path / "only", lm) != ask
    assert digests(tmp_path / "answer") == digests(tmp_path / "only") != digests(tmp_path / "ask")
    for column in ("ask", "answer"):
        _, words, ours = run_subject(tmp_path / column)
        assert ours and {w for d in words.read() for w in d.text.split()} == set(WORDS[:7] if column == "ask" else WORDS[7:])
    assert run_subject(tmp_path / "ask", text=str(both))[2] is True   # read as the run reads it
    assert run_subject(tmp_path / "ask", column="answer")[2] is False
    sentence(lambda: next(run(config(both), tmp_path / "new", lm=lm)), "ask, answer", "column")
    sentence(lambda: next(run(config(both, column="reply"), tmp_path / "new", lm=lm)), "reply", "ask, answer")
    sentence(lambda: next(run(config(both, column="ask"), tmp_path / "answer", resume=True, lm=lm)), "differs in column")


def test_windows_of_one_document_are_another_run(lm, tmp_path):
    table = notes(tmp_path / "t.csv", ["answer"])
    packed, apart = (trained(config(table, one_document=o), tmp_path / str(o), lm) for o in (False, True))
    assert packed != apart and digests(tmp_path / "True")["text digest"] != digests(tmp_path / "False")["text digest"]
    for one in (True, False): assert run_subject(tmp_path / str(one))[1].one_document is one and run_subject(tmp_path / str(one))[2]
    sentence(lambda: next(run(config(table), tmp_path / "True", resume=True, lm=lm)), "differs in one_document")


def test_a_run_of_an_earlier_version_goes_on(text, lm, tmp_path):
    "Its `config.json` lacks settings that came later; a setting that nobody knows is not passed over."
    whole = trained(config(text), tmp_path / "whole", lm)
    with closing(run(config(text), tmp_path / "run", lm=lm)) as going: list(islice(going, 3))
    path = tmp_path / "run/config.json"
    kept = read_json(path)
    path.write_text(json.dumps(kept | {"run": {k: v for k, v in kept["run"].items() if k not in ("column", "one_document", "store")}}))
    assert run_config(tmp_path / "run") == config(text)
    sentence(lambda: next(run(config(text, one_document=True), tmp_path / "run", resume=True, lm=lm)), "differs in one_document")
    assert [s.step for s in run(config(text), tmp_path / "run", resume=True, lm=lm)] == [4, 5, 6, 7, 8]
    assert (tmp_path / "run/sae.safetensors").read_bytes() == whole
    path.write_text(json.dumps(kept | {"run": kept["run"] | {"unheard_of": 1}}))
    sentence(lambda: next(run(config(text), tmp_path / "run", resume=True, lm=lm)), "differs in unheard_of")
    sentence(lambda: run_config(tmp_path / "run"), "config.json", "unheard_of")


# --- every setting does what it says, and nothing else --------------------------------------------------

def trace(cfg, folder, monkeypatch):
    "Train, and note everything that a setting could change, each under its name."
    seen = {}
    real = {name: getattr(sae_nb.runs, name) for name in ("load_lm", "batches", "train")}

    def blocks_noted(blocks):
        for i, block in enumerate(blocks):
            if not i: seen["blocks"] = digest({"rows": block.read()})
            yield block

    def train(sae, rows, settings, state, held_out):
        seen.update({f"train.{k}": v for k, v in settings.to_dict().items()} | {f"sae.{k}": v for k, v in sae.cfg.to_dict().items()})
        seen.update({"start": digest(dict(sae.state_dict())), "held out": digest({"rows": held_out}), "device": str(sae.W_enc.device)})
        order = []
        yield from real["train"](sae, (order.append(digest({"rows": r})) or r for r in rows), settings, state=state, held_out=held_out)
        seen["order"] = order

    def load(*given):
        seen["loaded"] = given
        return real["load_lm"](*given)

    monkeypatch.setattr(sae_nb.runs, "load_lm", load)
    monkeypatch.setattr(sae_nb.runs, "train", train)
    monkeypatch.setattr(sae_nb.runs, "batches", lambda blocks, *more, **how: real["batches"](blocks_noted(blocks), *more, **how))
    list(run(cfg, folder))
    monkeypatch.undo()
    about = read_json(folder / "config.json")
    assert about["run"] == cfg.to_dict() and about["train"] == {k[6:]: v for k, v in seen.items() if k.startswith("train.")}
    return seen | about["made of"] | {"weights": digest(dict(SAE.load(folder).state_dict())), "stored": bool(cfg.store and os.listdir(cfg.store))}


ROWS = {"blocks", "order"}                   # rows that are read, and those of each step
READ = ROWS | {"held out", "start", "weights"}   # the start is computed from the first rows
CHANGES = dict(   # the new value, and all that differs with it
    lm=("pylib-128", READ | {"loaded", "lm digest", "sae.lm", "sae.d", "train.k_aux"}), text=(None, READ | {"text digest"}),
    column=("answer", READ | {"text digest"}), one_document=(True, READ | {"text digest"}),
    site=("resid_post.2", READ | {"sae.site"}), context=(48, READ | {"sae.context"}), dtype=("bfloat16", READ | {"loaded"}),
    n=(512, {"sae.n", "train.lr", "start", "weights"}), k=(6, {"sae.k", "start", "weights"}),
    tokens=(9_000, ROWS | {"weights", "train.tokens", "train.dead_tokens", "train.ema"}),
    seed=(1, {"train.seed", "order", "start", "weights"}), batch=(3_000, ROWS | {"train.batch", "train.ema", "weights"}),
    lr=(.01, {"train.lr", "weights"}), aux=(.5, {"train.aux", "weights"}), multi_topk=(True, {"train.multi_topk", "weights"}),
    encoder=("bfloat16", {"train.encoder"}), normalise=("layer_norm", {"sae.normalise", "start", "weights"}), device=("auto", {"loaded"}),
    store=(None, ROWS | {"weights", "stored"}))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A small run on a column of a table, with dead latents, and what it does."
    folder = tmp_path_factory.mktemp("base")
    cfg = config(notes(folder / "t.csv"), column="ask", n=256, tokens=8_192)
    with pytest.MonkeyPatch.context() as m: return cfg, trace(cfg, folder / "run", m)


def test_every_setting_of_a_run_has_its_test(): assert set(CHANGES) == {f.name for f in fields(RunConfig)}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_of_a_run_changes_what_it_says_and_nothing_else(name, base, tmp_path, monkeypatch):
    "What is read, in which order, with what training starts and ends, and every setting that follows."
    if name == "device" and pick_device("auto").type != "cpu": pytest.skip("auto is another device here, with other roundings")
    value, wanted = CHANGES[name]
    if name == "text":
        value = notes(tmp_path / "u.csv")
        value.write_text(value.read_text().replace("two", "cow"))
    if name == "store": value = tmp_path / "store"
    cfg, before = base
    after = trace(replace(cfg, **{name: value}), tmp_path / "run", monkeypatch)
    assert before.keys() == after.keys()
    assert {k for k in before if before[k] != after[k]} - ({"weights"} if name == "encoder" else set()) == wanted


def test_a_run_is_judged_on_held_out_rows_and_starts_from_training_rows(text, lm):
    cfg = config(text)
    side = lambda rows, held_out: next(Stream(lm, sae_nb.runs.run_text(cfg), cfg.site, cfg.context, rows, held_out=held_out).blocks()).read()
    source = Source.of(cfg, lm)
    assert torch.equal(source.unseen, side(8_192, True)) and torch.equal(source.sample, side(2_048, False))
    both = torch.cat([source.unseen, source.sample]).unique(dim=0)
    assert len(both) > len(source.unseen.unique(dim=0)) and len(both) > len(source.sample.unique(dim=0))


def test_a_run_goes_on_on_another_device_and_with_nothing_else_changed(text):
    cfg = config(text)
    assert differing(cfg.to_dict(), replace(cfg, device="auto")) == []
    for name, value in dict(k=16, lr=1e-3, store="kept", column="body", encoder="bfloat16").items():
        assert differing(cfg.to_dict(), replace(cfg, **{name: value})) == [name]


@pytest.mark.parametrize("name", [f.name for f in fields(TrainConfig)])
def test_a_setting_goes_past_the_recipe_as_it_is(name):
    "And leaves what the rules say of all others."
    values = dict(tokens=999, encoder="bfloat16", multi_topk=True, decay=.25, ema=.5, beta1=.5, beta2=.5)
    ruled = recipe(64, 4, 999 if name == "tokens" else 2_048)
    value = values.get(name, 7)
    given = replace(ruled, **{name: value})
    assert recipe(64, 4, 999) == given if name == "tokens" else recipe(64, 4, 2_048, **{name: value}) == given != ruled


# --- rows far outside of the rest ------------------------------------------------------------------------

def far_out(text, lm, cfg, limit, size=700):
    "A source of small blocks without the rows beyond a limit, and how many it leaves out of each of its first blocks."
    words = sae_nb.runs.run_text(cfg)
    stream = lambda limit: Stream(lm, words, cfg.site, cfg.context, size, forward=256, limit=limit)
    counts = [int((b.read().norm(dim=-1) > limit).sum()) for b in islice(stream(float("inf")).blocks(), 6)]
    rows = [b.rows for b in islice(stream(limit).blocks(), 6)]
    def source():
        s, sample = stream(limit), next(stream(limit).blocks()).read()
        return Source(lm, sample, sample, s.blocks(), outside=s.outside)
    return source, counts, rows


def test_rows_left_out_are_counted_and_told_whatever_interrupts(text, lm, tmp_path):
    "Up to the block of each step; a run that goes on counts the blocks that it does not read again."
    cfg = config(text, batch=100, tokens=2_000)
    norms = next(Stream(lm, sae_nb.runs.run_text(cfg), cfg.site, cfg.context, 2_000).blocks()).read().norm(dim=-1)
    source, counts, rows = far_out(text, lm, cfg, norms.quantile(.9).item())
    ends = [sum(r // 100 for r in rows[:i + 1]) for i in range(6)]
    want = [sum(counts[:1 + next(i for i, e in enumerate(ends) if step <= e)]) for step in range(1, 21)]
    assert len(set(want)) >= 3 and all(counts)
    with pytest.warns(UserWarning, match=f"{want[-1]} of the rows"): list(run(cfg, tmp_path / "whole", source=source()))
    assert [s["left_out"] for s in read_steps(tmp_path / "whole")] == want and left_out(tmp_path / "whole") == want[-1]
    for stop in (1, ends[0] - 1, ends[0], ends[0] + 1, ends[1], 20):
        folder = tmp_path / str(stop)
        with closing(run(cfg, folder, source=source())) as going: list(islice(going, stop))
        with pytest.warns(UserWarning, match=f"{want[-1]} of the rows"): list(run(cfg, folder, resume=True, source=source()))
        assert [s["left_out"] for s in read_steps(folder)] == want, stop


def test_what_an_earlier_version_did_not_count_is_not_guessed(text, lm, tmp_path):
    cfg = config(text, batch=100, tokens=2_000)
    source, _, rows = far_out(text, lm, cfg, 1e9)
    with closing(run(cfg, tmp_path / "run", source=source())) as going: list(islice(going, rows[0] // 100 + 2))
    steps = read_steps(tmp_path / "run")
    (tmp_path / "run/steps.jsonl").write_text("".join(json.dumps({k: v for k, v in s.items() if k != "left_out"}) + "\n" for s in steps))
    list(run(cfg, tmp_path / "run", resume=True, source=source()))
    assert left_out(tmp_path / "run") is None
    list(run(cfg, tmp_path / "new", source=replace(source(), outside=None)))
    assert left_out(tmp_path / "new") is None and left_out(tmp_path) is None


def test_nothing_is_told_where_nothing_is_left_out(text, lm, tmp_path):
    with warnings.catch_warnings(record=True) as told: list(run(config(text), tmp_path / "run", lm=lm))
    assert left_out(tmp_path / "run") == 0 and not [w for w in told if "left out" in str(w.message)]


def test_rows_left_out_of_a_store_are_counted_by_all_who_share_it(text, lm, tmp_path, monkeypatch):
    cfg = config(text, store=str(tmp_path / "store"))
    norms = next(Stream(lm, sae_nb.runs.run_text(cfg), cfg.site, cfg.context, 2_000).blocks()).read().norm(dim=-1)
    monkeypatch.setattr(sae_nb.acts, "norm_limit", lambda *given: norms.quantile(.9).item())
    for name in ("first", "second"): list(run(cfg, tmp_path / name, lm=lm))
    kept = read_json(tmp_path / "store/store.json")["shards"]
    assert left_out(tmp_path / "first") == left_out(tmp_path / "second") == kept[0]["left_out"] > 100


def full_disk(monkeypatch, at):
    "From now on the write number `at` finds no room; gives the names of what was written."
    names, fsync = [], os.fsync
    def fails(handle):
        names.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        if len(names) - 1 == at: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)
    monkeypatch.setattr(os, "fsync", fails)
    return names


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_a_full_disk_at_any_write_is_a_sentence_and_the_run_goes_on(text, lm, tmp_path, monkeypatch):
    "At each file that a run writes: the sentence names it, and the same call ends with the bits of an untouched run."
    cfg = config(text, tokens=1_024)
    with monkeypatch.context() as m:
        names = full_disk(m, -1)
        list(run(cfg, tmp_path / "whole", lm=lm))
    assert len(names) > 4 and any("sae.safetensors" in n for n in names) and any("config.json" in n for n in names)
    for at, name in enumerate(names):
        folder = tmp_path / f"full{at}"
        with monkeypatch.context() as m:
            full_disk(m, at)
            sentence(lambda: list(run(cfg, folder, lm=lm)), "No space left", name.split(".")[1])
        assert not [p for p in folder.rglob("*") if "sae_nb-tmp" in p.name]
        list(run(cfg, folder, lm=lm, resume=True))
        assert SAE.load(folder).digest == SAE.load(tmp_path / "whole").digest


@pytest.mark.parametrize("begun", [False, True])
def test_a_full_disk_under_the_steps_is_a_sentence(text, lm, tmp_path, monkeypatch, begun):
    "A step without its line is taken again, the first one of a resumed run too."
    cfg = config(text, tokens=1_024)
    list(run(cfg, tmp_path / "whole", lm=lm))
    if begun:
        with closing(run(cfg, tmp_path / "run", lm=lm)) as steps: next(steps)
    def fails(path, mode="r", **more):
        if mode == "a": raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, mode, **more)
    with monkeypatch.context() as m:
        m.setattr(sae_nb.runs, "open", fails, raising=False)
        sentence(lambda: list(run(cfg, tmp_path / "run", lm=lm, resume=begun)), "steps.jsonl", "No space left", "--resume")
    list(run(cfg, tmp_path / "run", lm=lm, resume=True))
    told = [[s["step"] for s in read_steps(tmp_path / name)] for name in ("whole", "run")]
    assert told[0] == told[1] and SAE.load(tmp_path / "run").digest == SAE.load(tmp_path / "whole").digest


def test_odd_lines_among_the_steps_are_passed_over(text, lm, tmp_path):
    "Other types, deep nesting, numbers of five thousand digits: the steps that are steps are read."
    list(run(config(text, tokens=1_024), tmp_path / "run", lm=lm))
    log, steps = tmp_path / "run/steps.jsonl", read_steps(tmp_path / "run")
    odd = ['{"step": "x"}', "[1, 2]", "[" * 5_000 + "]" * 5_000, '{"step": ' + "9" * 5_000 + "}", "null", '{"step": 1', json.dumps(steps[0] | {"nmse": "low"})]
    log.write_text("\n".join([*odd, *map(json.dumps, steps)]) + "\n")
    assert read_steps(tmp_path / "run") == steps and steps


def test_a_full_memory_is_a_sentence(text, lm, tmp_path, monkeypatch):
    def fails(*a, **k): raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    monkeypatch.setattr(sae_nb.runs, "init_", fails)
    sentence(lambda: list(run(config(text, tokens=1_024), tmp_path / "run", lm=lm)), "memory")


@pytest.mark.parametrize("content", ["[" * 200 + "]" * 200, '{"d": ' + "9" * 5_000 + "}"], ids=["deep", "long"])
@pytest.mark.parametrize("name", ["config.json", "cfg.json", "metrics.json"])
def test_strange_json_in_a_run_is_a_sentence(text, lm, tmp_path, name, content):
    "Nothing that a run keeps brings the reader down, and nothing is lost."
    cfg = config(text, tokens=1_024)
    list(run(cfg, tmp_path / "run", lm=lm))
    (tmp_path / "run" / name).write_text(content)
    before = files(tmp_path / "run")
    reads = {"config.json": lambda: list(run(cfg, tmp_path / "run", lm=lm, resume=True)), "cfg.json": lambda: SAE.load(tmp_path / "run"),
             "metrics.json": lambda: read_json(tmp_path / "run/metrics.json")}
    sentence(reads[name], name)
    assert files(tmp_path / "run") == before
