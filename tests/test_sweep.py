"A sweep trains side by side what it would have trained alone, survives any kill, and ends in one table."
import csv, json, multiprocessing, random, shutil, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sae_nb.acts
import sae_nb.sweep
from sae_nb.acts import Block
from sae_nb.core import UserError, read_json
from sae_nb.lm import load_lm
from sae_nb.runs import RunConfig, run
from sae_nb.sweep import _remembered, flops_per_row, grid, is_done, side_by_side, sweep, sweep_rows, write_table


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path, g = tmp_path_factory.mktemp("text") / "t.txt", random.Random(0)
    path.write_text(" ".join(g.choice(["def", "return", "x", "=", "(", ")", "self", "import", "1", "\n"]) for _ in range(6_000)), encoding="utf-8")
    return RunConfig(lm="pylib-64", text=str(path), site="resid_post.1", n=64, k=4, tokens=10_240, batch=128, context=64, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def runs(base): return grid(base, n=[64, 128], k=[4, 8])


@pytest.fixture(scope="module")
def lm(): return load_lm("pylib-64", "cpu", "float32")


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert len(list(sweep(runs, folder))) == 4 * 80
    return folder


def weights(folder, name): return (folder / name / "sae.safetensors").read_bytes()


def numbers(folder): return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader((folder / "runs.csv").open())]


def test_a_grid_is_every_combination_under_its_own_name(base):
    runs = grid(base, n=[64, 128], lr=[1e-3, 2e-3], lm=["pylib-64", "pylib-128"])
    assert len(runs) == 8 and runs["n64-lr0.001-lm128"] == replace(base, n=64, lr=1e-3, lm="pylib-128") and list(grid(base)) == ["run"]


@pytest.mark.parametrize("lists, word", [(dict(size=[1]), "size"), (dict(n=[]), "at least one"), (dict(n=[64, 64]), "once"), (dict(k=[4, 999]), "k ≤ n"),
                                         (dict(text=["here", Path("here")]), "two runs would be kept in the folder texthere")])
def test_a_wrong_grid_is_said_in_a_sentence(base, lists, word):
    with pytest.raises(UserError, match=word): grid(base, **lists)


def test_side_by_side_gives_the_bits_of_each_alone(runs, lm, whole, tmp_path):
    for name in ("n64-k4", "n128-k8"):
        for _ in run(runs[name], tmp_path / name, lm=lm): pass
        assert weights(tmp_path, name) == weights(whole, name)


def test_no_run_is_a_step_ahead_of_another(runs, lm, tmp_path):
    "Else the blocks between them would be read again, or fill the memory."
    three = dict([*runs.items()][:3])
    seen, loop = dict.fromkeys(three, 0), side_by_side(three, tmp_path, lm)
    for _ in range(12):
        name, step = next(loop)
        seen[name] = step.tokens
        assert max(seen.values()) - min(seen.values()) <= 128
    loop.close()


def test_the_model_is_read_once_for_all(runs, lm, tmp_path, monkeypatch):
    read, count = sae_nb.acts.read_rows, []
    monkeypatch.setattr(sae_nb.acts, "read_rows", lambda lm, w, site: count.append(len(w)) or read(lm, w, site))
    for _ in side_by_side(dict(list(runs.items())[:1]), tmp_path / "one", lm): pass
    once, count[:] = sum(count), []
    for _ in side_by_side(runs, tmp_path / "four", lm): pass
    assert sum(count) == once


@pytest.mark.parametrize("stop", [3, 100, 317])
def test_interrupted_it_goes_on_to_the_same_table(runs, whole, tmp_path, stop):
    for i, _ in enumerate(sweep(runs, tmp_path, every=0.)):
        if i == stop: break
    last = list(sweep(runs, tmp_path))[-1]
    assert last.done == last.total == 4 * 10_240
    assert all(weights(tmp_path, n) == weights(whole, n) for n in runs) and numbers(tmp_path) == numbers(whole)


def work(runs, folder, threads):
    torch.set_num_threads(threads)   # as here: sums in another order differ in their last digits
    for _ in sweep({n: RunConfig(**c) for n, c in runs.items()}, folder, every=0.): pass


def test_killed_twice_at_random_it_ends_with_the_same_table(runs, whole, tmp_path):
    context, dice = multiprocessing.get_context("forkserver"), random.Random()
    context.set_forkserver_preload(["sae_nb.sweep", "transformers.models.gpt2.modeling_gpt2"])
    for kill in (True, True, False):
        process = context.Process(target=work, args=({n: c.to_dict() for n, c in runs.items()}, tmp_path, torch.get_num_threads()), daemon=True)
        process.start()
        lines = lambda: sum(p.read_bytes().count(b"\n") for p in tmp_path.rglob("steps.jsonl"))
        had = lines()
        while kill and process.is_alive() and lines() <= min(had + 1, 4 * 80 - 1): time.sleep(.01)
        if kill: time.sleep(dice.random() * .5); process.kill()
        process.join(120)
    assert process.exitcode == 0 and all(weights(tmp_path, n) == weights(whole, n) for n in runs) and numbers(tmp_path) == numbers(whole)


def test_the_half_table_of_a_killed_sweep_is_cleared_away(runs, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "sweep")
    (folder / ".runs.csv.999999999.sae_nb-tmp").write_text("half")
    list(sweep(runs, folder))
    assert not list(folder.glob(".*.sae_nb-tmp")) and numbers(folder) == numbers(whole)


def test_what_is_finished_is_not_trained_again(runs, whole):
    before = {n: (whole / n / "sae.safetensors").stat().st_mtime_ns for n in runs}
    assert list(sweep(runs, whole)) == []
    assert before == {n: (whole / n / "sae.safetensors").stat().st_mtime_ns for n in runs}


def test_a_finished_run_with_other_settings_is_refused(runs, whole):
    other = {n: replace(c, tokens=20_480) for n, c in runs.items()}
    with pytest.raises(UserError, match="tokens"): list(sweep(other, whole))


@pytest.mark.parametrize("lost", [0, 7, -1])
def test_a_finished_run_that_lacks_steps_is_told(runs, whole, tmp_path, lost):
    "A line that cannot be read would give the table another end, or a curve with a hole."
    folder = shutil.copytree(whole, tmp_path / "sweep")
    path = next(folder.glob("*/steps.jsonl"))
    lines = path.read_text().splitlines(keepends=True)
    lines[lost] = "damaged" + lines[lost]
    path.write_text("".join(lines))
    with pytest.raises(UserError, match="lacks steps of its finished run"): write_table(folder, runs)


@pytest.mark.parametrize("change", [dict(n=None), dict(n=256), dict(k=3)])
def test_a_run_that_says_other_sizes_than_its_weights_is_told(runs, whole, tmp_path, change):
    "A lost `n` would be read as the default, and counted in FLOPs and laws."
    folder = tmp_path / "runs"
    shutil.copytree(whole, folder)
    path = min(folder.rglob("config.json"))
    about = read_json(path)
    for name, value in change.items():
        if value is None: del about["run"][name]
        else: about["run"][name] = value
    path.write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(UserError, match=f"differ in {[*change][0]}"): sweep_rows(folder)


def test_the_table_counts_compute_and_marks_the_end(runs, whole):
    rows = sweep_rows(whole)
    finals = [r for r in rows if r["final"]]
    assert {r["run"] for r in finals} == set(runs) and all(r["tokens"] == 10_240 and r["flops"] == 12 * r["n"] * 64 * 10_240 for r in finals)
    assert flops_per_row(10, 3) == 360 and len(write_table(whole).rows) == 4 and len(numbers(whole)) == len(rows) > 4
    assert all(a["tokens"] < b["tokens"] for a, b in zip(rows, rows[1:]) if a["run"] == b["run"])


def test_nothing_to_do_is_said(tmp_path):
    with pytest.raises(UserError, match="no finished run"): write_table(tmp_path)
    with pytest.raises(UserError, match="no runs"): list(sweep({}, tmp_path))


def test_values_that_look_alike_are_runs_of_their_own(base, tmp_path):
    for name in ("a/b", "a_b", "b", "a b"): (tmp_path / name).mkdir(parents=True)
    values = ["a/b", "a_b", "b", "a b", str(tmp_path / "a/b"), str(tmp_path / "b"), "256", "pylib-256"]
    runs = grid(base, text=values)
    assert len(runs) == len(values) and [cfg.text for cfg in runs.values()] == values
    assert all("/" not in name and " " not in name for name in runs)


def test_a_table_holds_the_runs_that_were_asked_for(runs, whole):
    two = dict([*runs.items()][1:3])
    assert {row["run"] for row in sweep_rows(whole, two)} == {*two} and {row["run"] for row in sweep_rows(whole)} == {*runs}


def test_a_table_is_in_the_order_of_its_numbers(runs, whole):
    shutil.copytree(whole / "n64-k4", whole / "n1024-k4")
    try: names = [row["run"] for row in sweep_rows(whole) if row["final"]]
    finally: shutil.rmtree(whole / "n1024-k4")
    assert names == ["n64-k4", "n64-k8", "n128-k4", "n128-k8", "n1024-k4"]


def test_threads_that_read_ahead_find_what_they_ask_for():
    for trial in range(60):
        blocks = list(_remembered(iter([Block(2, lambda i=i: torch.full((2,), float(i))) for i in range(12)])))
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda i: blocks[i % 12].read()[0].item(), range(96)))
        assert found == [float(i % 12) for i in range(96)]


def test_a_sweep_does_not_mix_two_texts_of_one_name(base, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("one two three four five six seven\n" * 2_000)
    few = replace(base, text=str(path), tokens=2_048)
    list(sweep(grid(few, n=[64]), tmp_path / "sweep"))
    path.write_text("one two three four five six eight\n" * 2_000)
    with pytest.raises(UserError, match="text digest"): list(sweep(grid(few, n=[64, 128]), tmp_path / "sweep"))


def test_a_run_killed_between_its_two_files_can_be_evaluated(runs, whole, tmp_path):
    from sae_nb.sae import SAE
    shutil.copytree(whole / "n64-k4", tmp_path / "run")
    (tmp_path / "run/cfg.json").unlink()
    assert SAE.load(tmp_path / "run").cfg.n == 64


# --- what may be shared -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    "Runs that each differ from the first in one thing that decides the rows, two of them on the same rows, and two more texts."
    folder, g = tmp_path_factory.mktemp("apart"), random.Random(1)
    line = lambda some: " ".join(g.choice(some) for _ in range(24))
    with open(folder / "t.csv", "w", newline="") as f:
        out = csv.writer(f)
        out.writerows([("ask", "answer"), *((line(["x", "=", "1", "def"]), line(["self", "(", ")", "import"])) for _ in range(300))])
    shutil.copy(folder / "t.csv", folder / "u.csv")
    (folder / "u.csv").write_text((folder / "u.csv").read_text().replace("def", "return"))
    first = RunConfig(lm="pylib-64", text=str(folder / "t.csv"), column="ask", site="resid_post.1", n=64, k=4, tokens=2_048, context=32, dtype="float32", device="cpu")
    others = dict(site="resid_post.2", context=48, text=str(folder / "u.csv"), column="answer", one_document=True, tokens=1_500, batch=3_000, dtype="bfloat16",
                  lm="pylib-128", store=str(folder / "store"))
    return {"first": first, "more": replace(first, n=128), **{name: replace(first, **{name: value}) for name, value in others.items()}}


@pytest.fixture(scope="module")
def alone(apart, tmp_path_factory):
    "Each of them by itself."
    folder = tmp_path_factory.mktemp("alone")
    for name, cfg in apart.items():
        for _ in run(replace(cfg, store=cfg.store and str(folder / "store")), folder / name): pass
    return folder


def test_runs_on_other_rows_do_not_share_the_rows_of_the_first(apart, alone, tmp_path, monkeypatch):
    "Together or in any order, each ends as by itself; only the two on the same rows are read once."
    made, real = [], sae_nb.sweep.Source.of
    monkeypatch.setattr(sae_nb.sweep.Source, "of", lambda cfg, lm: made.append(cfg) or real(cfg, lm))
    order = list(apart.items())[::-1]
    list(sweep(dict(order), tmp_path))
    assert len(made) == len(apart) - 1
    for name in apart: assert weights(tmp_path, name) == weights(alone, name), name
    assert len({weights(alone, name) for name in apart}) == len(apart)


def test_a_sweep_goes_on_beside_finished_runs_of_other_texts(apart, alone, tmp_path):
    "What is finished is compared with its own text: another column, or windows cut otherwise, are no change of it."
    for name in ("column", "one_document", "text", "dtype"): shutil.copytree(alone / name, tmp_path / name)
    runs = {name: apart[name] for name in ("first", "column", "one_document", "text", "dtype")}
    assert {p.run for p in sweep(runs, tmp_path)} == {"first"} and weights(tmp_path, "first") == weights(alone, "first")


def test_a_finished_run_of_an_earlier_version_is_done(apart, alone, tmp_path):
    folder = shutil.copytree(alone / "text", tmp_path / "run")
    kept = read_json(folder / "config.json")
    for gone in (["one_document"], ["one_document", "store", "multi_topk"]):
        (folder / "config.json").write_text(json.dumps(kept | {"run": {k: v for k, v in kept["run"].items() if k not in gone}}))
        assert is_done(folder, apart["text"]) and [r["run"] for r in sweep_rows(tmp_path) if r["final"]] == ["run"]
        with pytest.raises(UserError, match="differs in one_document"): is_done(folder, replace(apart["text"], one_document=True))
    (folder / "config.json").write_text('{"run": []}')
    with pytest.raises(UserError, match="config.json"): is_done(folder, apart["text"])
    for lost, said in ((dict(d=64), "learning rate"), (dict(d=-1, train={"lr": 1}), "width"), (dict(d=64, train={"lr": "1"}), "learning rate"),
                       (dict(run=kept["run"] | {"n": "many"}, d=64, train={"lr": 1}), "n is 'many'")):
        (folder / "config.json").write_text(json.dumps({"run": kept["run"]} | lost))
        with pytest.raises(UserError, match="config.json.*" + said): sweep_rows(tmp_path)
