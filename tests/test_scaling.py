"Laws recover what was planted, refuse what cannot be told, and answer mistakes with one sentence."
import importlib.util, json, math
from pathlib import Path

import numpy as np
import pytest

from sae_nb.core import Table, UserError
from sae_nb.plan import advise, compare, converged, converged_runs, curves, envelope, largest_stable
from sae_nb.scaling import Form, best, column, fit_law, fit_rows, read_runs, redraw, runs_of, solve, starts, weight
from sae_nb.suite import MEANING

TRUTH = dict(alpha=-.50, beta_k=.26, beta_n=-.017, gamma=-.042, zeta=-1.32, eta=-.085)   # the paper's form; the values are unverified
SIZES, KS = 2**np.arange(11, 24), 2**np.arange(3, 9)


def joint(k, n):
    "The planted L(n, k), written out."
    a, bk, bn, g, z, e = TRUTH.values()
    return np.exp(a + bk * np.log(k) + bn * np.log(n) + g * np.log(k) * np.log(n)) + np.exp(z + e * np.log(k))


def grid(noise=.01, seed=0, sizes=SIZES, ks=KS):
    "A row for each n and k."
    rng = np.random.default_rng(seed)
    return [dict(n=int(n), k=int(k), loss=float(joint(k, n) * np.exp(noise * rng.standard_normal()))) for k in ks for n in sizes]


def single(noise=.01, seed=0, sizes=SIZES, a=1.5, b=-.16, e=.2):
    "A row for each n."
    rng = np.random.default_rng(seed)
    return [dict(n=int(n), loss=float((e + a * n**b) * np.exp(noise * rng.standard_normal()))) for n in sizes]


# --- each definition against a slow one --------------------------------------------------------------

@pytest.mark.parametrize("law, columns, theta", [("n", dict(n=SIZES), [.4, -.16, -1.6]), ("nk", dict(k=[8, 32, 256], n=[4096, 2**20, 2**14]), [*TRUTH.values()])])
def test_the_gradient_is_that_of_differences(law, columns, theta):
    form, theta = Form.of(law), np.array([theta])
    X = form.design(columns)
    value, gradient = form.log(theta, X)
    slow = np.stack([(form.log(theta + h, X)[0] - form.log(theta - h, X)[0]) / 2e-6 for h in 1e-6 * np.eye(theta.shape[1])], -1)
    np.testing.assert_allclose(gradient, slow, atol=1e-6)
    direct = joint(np.array(columns["k"]), np.array(columns["n"])) if law == "nk" else np.exp(-1.6) + np.exp(.4) * np.array(columns["n"])**-.16
    np.testing.assert_allclose(np.exp(value[0]), direct)


def test_the_fit_is_the_best_of_a_dense_search():
    rows, form = single(.02, 3), Form.of("n")
    y, X = np.log(column(rows, "loss")), form.design({"n": column(rows, "n")})
    fit = best(form, y, X)
    floors = np.linspace(.05, .3, 2001)
    b = np.linspace(-.3, -.05, 101)
    lowest = math.inf
    for slope in b:
        shape = column(rows, "n")**slope
        for e in floors[::20]:
            scale = np.exp(np.mean(np.log(np.exp(y) - e) - np.log(shape))) if (np.exp(y) > e).all() else 1.
            for s in (scale * .98, scale, scale * 1.02): lowest = min(lowest, cost(y - np.log(e + s * shape), fit.delta))
    assert fit.cost(fit.delta) <= lowest + 1e-12


def cost(r, delta):
    "The Huber cost, written out."
    return sum(v * v if abs(v) <= delta else 2 * delta * abs(v) - delta**2 for v in r)


def test_the_cost_is_hubers():
    fit = best(Form.of("n"), np.log(column(single(.02, 1), "loss")), Form.of("n").design({"n": SIZES}))
    for delta in (.001, .02, 10.): assert fit.cost(delta) == pytest.approx(cost(fit.residuals, delta))
    assert weight(np.array([.5, -4.]), 2.).tolist() == [1, .5]


@pytest.mark.parametrize("law", ["n", "nk"])
def test_noiseless_runs_give_the_law_back(law):
    fit = fit_law(grid(0) if law == "nk" else single(0), law, bootstrap=50)
    want = TRUTH if law == "nk" else dict(a=1.5, b=-.16, e=.2)
    assert {c: pytest.approx(v, abs=1e-4) for c, v in want.items()} == {c: e.value for c, e in fit.coefficients.items()}
    assert fit.rmse_log < 1e-6 and fit.held_out["with_floor"]["relative_error"] < 1e-3 < fit.held_out["without_floor"]["relative_error"]


def test_many_problems_at_once_are_solved_as_one_by_one():
    form, X = Form.of("n"), Form.of("n").design({"n": SIZES})
    y = np.stack([np.log(column(single(.02, s), "loss")) for s in range(5)])
    begin = np.stack([starts(form, one, X)[3] for one in y])
    together = solve(form, y, X, begin)
    alone = np.concatenate([solve(form, y[i:i + 1], X, begin[i:i + 1]) for i in range(5)])
    np.testing.assert_allclose(form.log(together, X)[0], form.log(alone, X)[0], atol=1e-5)


def test_a_power_law_has_the_closed_form_of_least_squares():
    rows = [dict(n=n, tokens=3. * n**.6 * w) for n, w in zip((10, 100, 1000, 10_000), (1.1, .9, 1.05, .98))]
    fit = fit_law(rows, "tokens ~ n", bootstrap=50)
    slope, height = np.polyfit(np.log(column(rows, "n")), np.log(column(rows, "tokens")), 1)
    assert fit.coefficients["b"].value == pytest.approx(slope) and fit.coefficients["a"].value == pytest.approx(np.exp(height))
    assert fit.form.names == ("a", "b") and fit_law(single(), "n", 50, floor=False).form.names == ("a", "b")


# --- what was planted is recovered ---------------------------------------------------------------------

@pytest.mark.parametrize("law, noise", [("n", .01), ("n", .03), ("nk", .01), ("c", .01)])
def test_intervals_hold_the_planted_values(law, noise):
    """The small twin of the slow cell of the notebook: shares of 24 worlds."""
    form = Form.of(law)
    k, n = (a.ravel() for a in np.meshgrid(KS, SIZES))
    theta, at = {"n": ([np.log(1.5), -.16, np.log(.2)], dict(n=SIZES)), "nk": ([*TRUTH.values()], dict(k=k, n=n)),
                 "c": ([np.log(.056), -.084, np.log(.09)], dict(flops=np.logspace(-7, -1, 60)))}[law]
    X, held = form.design(at), 0
    clean = form.log(np.array([theta]), X)[0][0]
    for seed in range(24):
        y = clean + noise * np.random.default_rng(seed).standard_normal(len(clean))
        low, high = np.quantile(redraw(best(form, y, X), range(len(y)), 100, seed).draws, [.025, .975], axis=0)
        held = held + ((low <= theta) & (np.array(theta) <= high))
    assert (held >= 19).all(), held


def test_compute_in_any_unit():
    rng = np.random.default_rng(0)
    rows = [dict(run=i, flops=float(c), loss=float((.09 + .056 * c**-.084) * np.exp(.01 * rng.standard_normal()))) for i, c in enumerate(np.logspace(-7, -1, 60))]
    small, large = fit_law(rows, "c", 100), fit_law([r | {"flops": r["flops"] * 1e25} for r in rows], "c", 100)
    for c in "be": assert small.coefficients[c].value == pytest.approx(large.coefficients[c].value, rel=1e-3)
    assert small.coefficients["e"].low < .09 < small.coefficients["e"].high


def test_the_largest_runs_are_predicted_and_the_floor_helps():
    held = fit_law(grid(), "nk", 200).held_out
    assert held["left_out"] == {"n": [2.**22, 2.**23]} and len(held["with_floor"]["runs"]) == 12
    assert held["with_floor"]["relative_error"] < .03 < held["without_floor"]["relative_error"] < held["null"]["relative_error"] + .02
    for r in held["with_floor"]["runs"]:
        assert r["low"] < r["predicted"] < r["high"] and r["relative_error"] == pytest.approx(r["predicted"] / r["measured"] - 1)


def test_one_bad_run_does_not_take_the_curve_with_it():
    rows = single(.005)
    astray = [r | {"loss": r["loss"] * (1.5 if i == 9 else 1)} for i, r in enumerate(rows)]
    a, b = (fit_law(t, "n", 50).coefficients["b"].value for t in (rows, astray))
    assert abs(a - b) < .02


def test_seeds_of_one_size_are_not_independent():
    rng = np.random.default_rng(0)
    rows = [r | {"seed": s, "loss": r["loss"] * math.exp(m + .002 * rng.standard_normal())} for r, m in zip(single(0), .02 * rng.standard_normal(13)) for s in range(4)]
    y, X = np.log(column(rows, "loss")), Form.of("n").design({"n": column(rows, "n")})
    grouped, alone = (np.ptp(np.quantile(redraw(best(Form.of("n"), y, X), g, 400, 0).draws[:, 1], [.025, .975])) for g in ([r["n"] for r in rows], range(52)))
    assert grouped > 1.3 * alone


def test_the_same_seed_gives_the_same_law():
    a, b, c = (fit_law(single(), "n", 100, seed=s) for s in (0, 0, 1))
    assert a.to_dict() == b.to_dict() != c.to_dict() and "e = " in repr(a) and "| e |" in a._repr_markdown_()


def test_json_holds_the_contract(tmp_path):
    fit = fit_law(grid(), "nk", 100)
    fit.save(tmp_path / "law.json")
    kept = json.loads((tmp_path / "law.json").read_text())
    assert kept == fit.to_dict() and kept["law"] == "nk" and kept["runs"] == 78 and 0 < kept["rmse_log"] < .02
    assert [*kept["coefficients"]] == [*TRUTH] and all({*c} == {"value", "low", "high"} and c["low"] < c["high"] for c in kept["coefficients"].values())
    assert {"left_out", "with_floor", "without_floor"} <= {*kept["held_out"]} and [*fit_law(single(), "n", 50).to_dict()["coefficients"]] == ["a", "b", "e"]


# --- refusals and mistakes ------------------------------------------------------------------------------

def says(word, f, *args, **more):
    "It is refused in one sentence that has `word` in it."
    with pytest.raises(UserError, match=word) as e: f(*args, **more)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("rows, law, word", [
    (single()[:2], "n", "2 different n"), (single()[:1] * 9, "n", "1 different n"), ([r | {"loss": .3} for r in single()], "n", "does not fall"),
    ([r | {"loss": 2 * r["n"]**-.2} for r in single()], "n", "does not flatten"), ([r | {"loss": 1 / r["loss"]} for r in single()], "n", "does not fall"),
    ([r | {"k": r["n"] // 64} for r in single()], "nk", "change together"), (grid(ks=[8, 16]), "nk", "2 different k"), (grid(sizes=SIZES[:3]), "nk", "3 different n"),
    ([r | {"d": 256} for r in grid()], "nk", "width 256"), (grid(), "n", "mix k"), ([r | {"subject": i % 2} for i, r in enumerate(single())], "n", "mix subject"),
    ([r | {"loss": math.nan} for r in single()], "n", "row 1: loss is nan"), ([r | {"loss": -.1} for r in single()], "n", "loss is -0.1"),
    ([r | {"loss": "soon"} for r in single()], "n", "'soon'"), ([r | {"loss": None} for r in single()], "n", "None"), ([r | {"loss": 0} for r in single()], "n", "loss is 0"),
    (single(), "c", "no column 'flops'"), (single(), "nk", "no column 'k'"), ([{"n": 1}], "n", "no column 'loss'"), ([], "n", "no rows"), (single(), "x", "choose c, n, nk"),
    ([dict(n=n, k=32, seed=0, tokens=t, loss=.3) for n in SIZES for t in (1, 10, 100)], "n", "converged_runs"),
    ([dict(n=n, flops=float(f) * (1 + n / 1e9), loss=.3) for n in SIZES for f in (1e10, 1e12, 1e14)], "c", "envelope")])
def test_degenerate_tables_are_refused(rows, law, word):
    says(word, fit_law, rows, law, 50)


@pytest.mark.parametrize("text, word", [("", "nothing in it"), ("n,loss\n", "no row below"), ("n,loss\n1,2,3\n", "3 values for 2 columns"), ("n,n\n1,2\n", "name of its own"),
                                        ('n,loss\n"1,2\n', "CSV"), ("n,loss\n512,abc\n", "'abc'"), ("n,loss\n512,nan\n", "nan"), ("n,loss\n512,\n", "None"), ("n,k\n512,8\n", "'loss'")])
def test_bad_files_are_answered_in_one_sentence(tmp_path, text, word):
    (tmp_path / "runs.csv").write_text(text)
    says(word, fit_law, tmp_path / "runs.csv", "n")
    says("cannot be read", fit_law, tmp_path / "none.csv", "n")


def test_tables_of_all_kinds_are_read(tmp_path):
    rows = single()
    (tmp_path / "runs.csv").write_text("\ufeffn, loss ,subject\n" + "".join(f"{r['n']},{r['loss']!r},small\n" for r in rows), encoding="utf-8")
    read = read_runs(tmp_path / "runs.csv").rows
    assert [r["n"] for r in read] == [r["n"] for r in rows] and read[0]["subject"] == "small"
    class Frame:
        def to_dict(self, kind): return rows
    wanted = fit_law(rows, "n", 50).to_dict()["coefficients"]
    for table in (tmp_path / "runs.csv", str(tmp_path / "runs.csv"), Table(rows), Frame()): assert fit_law(table, "n", 50).to_dict()["coefficients"] == wanted
    assert runs_of(Table(rows)) == rows


def test_columns_that_a_law_does_not_need_may_be_empty():
    assert fit_law([r | {"tokens": None, "k": None} for r in single()], "n", 50).to_dict()["coefficients"] == fit_law(single(), "n", 50).to_dict()["coefficients"]


def test_only_final_rows_of_a_sweep_count():
    rows = [r | {"loss": r["loss"] * f, "tokens": t, "final": str(t == 100)} for r in single() for t, f in ((1, 2.), (10, 1.3), (100, 1.))]
    assert fit_law(rows, "n", 50).coefficients["b"].value == fit_law(single(), "n", 50).coefficients["b"].value


def test_weak_floors_carry_a_note():
    fit = fit_rows(single(.01, 8)[:7], Form.of("n"), 200, 0)
    assert fit.coefficients["e"].low < .05 and not fit_law(single(), "n", 50).about["notes"]


def test_predictions_name_what_they_need():
    says("depends on n", fit_law(single(), "n", 50).predict, k=3)
    law = fit_law(single(), "n", 200)
    inside, far = law.predict(n=[2**16, 2**40])
    run = law.predict(new=True, n=2**16)[0]
    assert far.high - far.low > inside.high - inside.low and run.high - run.low > inside.high - inside.low
    says("at least 20", fit_law, single(), "n", 3)


# --- curves and advice ----------------------------------------------------------------------------------

def curve(e, a, b, t): return [dict(n=64, tokens=float(x), loss=float(e + a * x**-b)) for x in t]


def test_convergence_of_a_known_curve():
    """L = e + a/T: a doubling to T wins a/T of e + 2a/T, so that it falls below w where T = a(1 - 2w)/(we)."""
    t, w = np.geomspace(1, 1e4, 4001), .02
    found = converged(curve(.5, 3., 1., t), w)
    assert found.tokens == pytest.approx(3 * (1 - 2 * w) / (w * .5), rel=.01) and found.drop < w
    assert converged(curve(0, 3., .5, t), w).tokens is None
    says("doubling", converged, curve(0, 3., .5, [1, 1.5]))
    says("within is 2", converged, curve(0, 3., .5, t), 2)
    says("no training has converged", converged_runs, curve(0, 3., .5, t))


def test_a_late_drop_undoes_convergence():
    t = np.geomspace(1, 1e4, 400)
    flat = [r | {"loss": r["loss"] * (.9 if r["tokens"] > 6e3 else 1)} for r in curve(.5, 3., 1., t)]
    assert converged(curve(.5, 3., 1., t), .02).tokens < 400 and converged(flat, .02).tokens is None


def test_the_envelope_is_below_every_curve():
    rng = np.random.default_rng(0)
    rows = [dict(n=n, flops=float(f), loss=float((.1 + n**-.3) * (1 + n**.5 * f**-.5))) for n in (10, 100, 1000) for f in np.geomspace(1, 1e6, 40) * np.exp(.01 * rng.standard_normal(40))]
    edge = envelope(rows).rows
    assert len({r["n"] for r in edge}) == 3 and [r["flops"] for r in edge] == sorted(r["flops"] for r in edge)
    for c in curves(rows, "flops").values():
        for r in edge:
            at = np.interp(math.log(r["flops"]), [math.log(p["flops"]) for p in c], [p["loss"] for p in c], left=math.inf, right=math.inf)
            assert r["loss"] <= at + 1e-12
    alone = [r for r in rows if r["n"] == 10]
    assert envelope(alone).rows == sorted(alone, key=lambda r: r["flops"])


def test_the_largest_stable_rate():
    rows = [dict(n=n, lr=lr, loss=math.nan if lr * n > 8 else .3) for n in (1, 2, 4) for lr in (.5, 1, 2, 4, 8, 16)]
    assert [r["lr"] for r in largest_stable(rows).rows] == [8, 4, 2]
    says("larger", largest_stable, [r for r in rows if r["lr"] < 4])
    says("has failed", largest_stable, [r | {"loss": math.nan} for r in rows])
    gap = [dict(n=1, lr=1., loss=.3), dict(n=1, lr=2., loss=9.), dict(n=1, lr=4., loss=.31)]
    assert largest_stable(gap).rows[0]["lr"] == 1
    slow = [dict(n=1, lr=lr, loss=l) for lr, l in ((.1, .9), (.2, .5), (.4, .3), (.8, .33), (1.6, .6))]   # too small a rate is slow, not unstable
    assert largest_stable(slow).rows == [dict(n=1, lr=.8, failed_at=1.6)]


def test_differences_of_exponents():
    laws = {b: fit_law(single(.01, i, b=b), "n", 300) for i, b in enumerate((-.16, -.25))}
    rows = compare(laws).rows
    assert rows[0]["difference"] == "" and rows[1]["difference"].startswith("-0.") and "to -0." in rows[1]["difference"]
    says("no coefficient", compare, laws, "gamma")


@pytest.mark.parametrize("price, budget", [(0, 1e15), (600, 1e16), (2000, 3e16)])
def test_advice_is_what_a_dense_search_finds(price, budget):
    law = fit_law(grid(0, sizes=2**np.arange(9, 20)), "nk", 50)
    spend, need = lambda n, k, t: 1536 * (n + price * k) * t, lambda n: 3e5 * n**.6
    K, N = np.meshgrid(np.arange(8, 257), np.geomspace(64, 2**21, 4000))
    lowest = np.where(spend(N, K, need(N)) <= budget, joint(K, N), np.inf).min()
    said = advise(law, budget, spend, need)
    assert joint(said.k.value, said.n.value) < 1.002 * lowest and spend(said.n.value, said.k.value, said.tokens.value) <= budget * 1.0001
    assert spend(said.n.value + 2, said.k.value, need(said.n.value + 2)) > budget and "| k |" in said._repr_markdown_()


def test_advice_knows_its_borders():
    law, tokens = fit_law(single(), "n", 100), fit_law([dict(n=int(n), tokens=1e5 * n**.6 * (1 + .01 * (i % 3))) for i, n in enumerate(SIZES)], "tokens ~ n", 100)
    spend = lambda n, k, t: n * t
    inside, above, below = (advise(law, n**1.6 * 1e5, spend, tokens) for n in (2.**16, 2.**26, 2.**8))
    assert not inside.warnings and any("above the largest" in w for w in above.warnings) and any("below the smallest" in w for w in below.warnings)
    assert inside.n.low <= 2**16 * 1.02 and inside.n.value == pytest.approx(2**16, rel=.02) and inside.k is None
    says("single latent", advise, law, 1e-9, spend, tokens)
    says("budget is -1", advise, law, -1, spend, tokens)
    says("against n", advise, tokens, 1., spend, tokens)


# --- the recorded sweep ------------------------------------------------------------------------------

RECORDED = Path(__file__).resolve().parent.parent / "recipes" / "results" / "laws.csv"


def recorded(part="nk", **wanted):
    "Rows of the recorded table."
    return [r for r in read_runs(RECORDED).rows if r["part"] == part and all(r[c] == v for c, v in wanted.items())]


def recipe_file(name):
    "A file of `recipes/` as a module."
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECORDED.parents[1] / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recorded_runs_are_those_of_the_recipe():
    "Every run of `recipes/laws.py` stands in the table with the settings that it would have today, and no other."
    key = lambda part, cfg, lr: (part, cfg.lm, cfg.site, cfg.n, cfg.k, cfg.seed, round(lr, 9), cfg.tokens)
    width = {"pylib-64": 64, "pylib-128": 128, "pylib-256": 256}
    asked = sorted(key(part, cfg, cfg.train_config(width[cfg.lm]).lr) for part, runs in recipe_file("laws").parts(1).items() for cfg in runs.values())
    kept = sorted((r["part"], r["lm"], r["site"], r["n"], r["k"], r["seed"], round(r["lr"], 9), r["tokens"])
                  for r in read_runs(RECORDED).rows if str(r["final"]) == "True")
    assert kept == asked and len(kept) == 121


def test_the_recorded_sizes_are_those_of_the_recipe(tmp_path):
    "So are the evaluations of `recipes/sizes.py`, and each has all measures of today's suite."
    kept = json.loads((RECORDED.parent / "sizes.json").read_text())
    assert [(r["n"], r["seed"]) for r in kept] == [(cfg.n, cfg.seed) for cfg in recipe_file("sizes").sizes(tmp_path).values()]
    assert all(set(r["metrics"]) == set(MEANING) for r in kept)


def test_a_straight_line_foretells_the_largest_recorded_size_where_a_floor_is_refused():
    "k = 4: within 1 %, inside the interval."
    says("does not flatten", fit_law, recorded(k=4), "n", 50)
    said = fit_law(recorded(k=4), "n", 500, floor=False).held_out
    assert said["left_out"] == {"n": [2048.]} and "does not flatten" in said["with_floor"]["missing"]
    assert said["without_floor"]["relative_error"] < .01 < said["null"]["relative_error"]
    assert all(r["low"] < r["measured"] < r["high"] for r in said["without_floor"]["runs"])


def test_a_floor_foretells_the_largest_recorded_size():
    "k = 8: within 2 %, inside the interval, and better than without a floor or than the last size."
    said = fit_law(recorded(k=8), "n", 500).held_out
    assert said["left_out"] == {"n": [2048.]} and len(said["with_floor"]["runs"]) == 2
    assert said["with_floor"]["relative_error"] < min(.02, said["without_floor"]["relative_error"] / 1.5) < said["null"]["relative_error"]
    assert all(r["low"] < r["measured"] < r["high"] for r in said["with_floor"]["runs"])


def test_floors_that_vanish_in_a_sample_do_not_stop_the_fit():
    "In some bootstrap samples of all recorded k the floor is zero to machine precision, and its coefficients have no gradient."
    law = fit_law([r for r in recorded() if r["n"] < 2048], "nk", 300)
    assert np.isfinite(law.draws).all() and law.rmse_log > .04   # k up to a quarter of the width: the form does not hold


def test_an_envelope_of_several_seeds_is_one_law():
    "Seeds of one size take turns on the frontier; that is no mixture of curves."
    edge = envelope(recorded(k=8))
    assert len({r["seed"] for r in edge.rows}) == 2
    law = fit_law(edge, "c", 100)
    assert law.coefficients["b"].high < 0 < law.coefficients["e"].low
    says("lower envelope", fit_law, recorded(k=8), "c", 100)


# --- tables as people have them ----------------------------------------------------------------------

def as_csv(rows, path, flag=str):
    names = [*rows[0]]
    path.write_text("\n".join([",".join(names), *(",".join(flag(r[n]) if isinstance(r[n], bool) else str(r[n]) for n in names) for r in rows)]) + "\n")
    return path


def test_flags_as_excel_writes_them_choose_the_same_runs(tmp_path):
    rows = [r | {"final": end, "loss": r["loss"] * (1 if end else 1.7)} for r in single() for end in (False, True)]
    laws = [fit_law(as_csv(rows, tmp_path / "runs.csv", flag), "n", 50) for flag in (str, lambda b: str(b).upper(), lambda b: str(b).lower(), lambda b: str(int(b)))]
    assert len({(len(law.y), *law.theta.tolist()) for law in laws}) == 1 and len(laws[0].y) == len(rows) / 2


def test_rows_are_chosen_by_their_values(tmp_path):
    rows = [r | {"subject": s, "loss": r["loss"] * f} for r in single() for s, f in (("pylib-64", 1.), ("pylib-128", 2.))]
    path = as_csv(rows, tmp_path / "runs.csv")
    chosen = runs_of(path, {"subject": "pylib-128"})
    assert chosen == [r for r in read_runs(path).rows if r["subject"] == "pylib-128"] and len(chosen) == len(rows) / 2
    assert {r["n"] for r in runs_of(path, {"n": str(rows[0]["n"])})} == {rows[0]["n"]} == {r["n"] for r in runs_of(rows, {"n": np.int64(rows[0]["n"])})}
    for wrong, word in (({"subject": "gpt2"}, "pylib-64"), ({"model": "x"}, "'model'")):
        with pytest.raises(UserError, match=word): runs_of(path, wrong)


def test_sentences_name_the_line_of_the_file(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("n,loss\n\n1,2\n2,3\n\n4,soon\n8,1\n")
    with pytest.raises(UserError, match="row 6: loss is 'soon'"): fit_law(path, "n")
    with pytest.raises(UserError, match="row 6"): fit_law(runs_of(path)[1:], "n")


def test_data_frames_are_tables():
    pd, pl = pytest.importorskip("pandas"), pytest.importorskip("polars")
    laws = [fit_law(table, "n", 50) for table in (single(), pd.DataFrame(single()), pl.DataFrame(single()))]
    assert len({tuple(law.theta.tolist()) for law in laws}) == 1


@pytest.mark.parametrize("value", [10**400, -10**400, "9" * 5000, True, None, float("inf")])
def test_no_value_is_too_strange_for_a_sentence(value, tmp_path):
    rows = single()
    with pytest.raises(UserError) as told: fit_law([rows[0] | {"loss": value}, *rows[1:]], "n", 50)
    assert "row 1: loss" in str(told.value) and len(str(told.value)) < 200


def figure(noise=.004):
    "Points of nine training curves as they are read off a figure: no size is read twice the same."
    g = np.random.default_rng(0)
    rows = []
    for n in np.geomspace(1e8, 1e10, 9):
        for tokens in np.geomspace(n, 300 * n, 12):
            rows.append(dict(n=n * np.exp(noise * g.standard_normal()), flops=6 * n * tokens, loss=1.8 + 400 / n**.34 + 410 / tokens**.28))
    return rows


def test_sizes_read_off_a_figure_are_joined():
    near = envelope(figure())
    assert len({r["n"] for r in near.rows}) <= 9 and near.column("flops") == envelope(figure(noise=0.)).column("flops")
    with pytest.warns(UserWarning, match="one point"): alone = envelope(figure(), tolerance=0.)
    assert len(alone.rows) == len(figure()) > 2 * len(near.rows)


def test_sizes_of_one_file_that_are_near_stay_apart():
    rows = [dict(n=n, flops=6. * n * t, loss=1 + 1 / n + 1 / t) for n in (1000, 1010) for t in (1e3, 1e4, 1e5)]
    assert len(curves(envelope(rows).rows, "flops")) == 2


def test_a_law_of_compute_wants_to_know_the_trainings():
    rows = [{"flops": r["flops"], "loss": r["loss"]} for r in figure()]
    with pytest.raises(UserError, match="a column n, or run"): fit_law(rows, "c", 50)


def test_intervals_of_a_law_of_compute_count_trainings_and_not_points():
    g = np.random.default_rng(1)
    def rows(name):
        made = []
        for i, start in enumerate(np.geomspace(1e9, 1e13, 12)):
            own = .03 * g.standard_normal()
            made += [{name: f"{i}", "flops": start * f, "loss": float(np.exp(own) * (.1 + 30 * (start * f)**-.2))} for f in (1., 1.1, 1.2, 1.3)]
        return made
    made = rows("run")
    wide, alone = fit_law(made, "c", 300), fit_law([r | {"run": i} for i, r in enumerate(made)], "c", 300)
    width = lambda law: law.coefficients["b"].high - law.coefficients["b"].low
    assert width(wide) > 1.3 * width(alone)


def test_sizes_that_err_together_are_told():
    g = np.random.default_rng(0)
    n = np.geomspace(64, 65_536, 16)
    def law(errors): return fit_law([dict(n=int(m), loss=float((.1 + 3 * m**-.5) * np.exp(e))) for m, e in zip(n, errors)], "n", 50)
    together = .01 * np.sin(np.linspace(0, 9, 16))
    assert any("err together" in note for note in law(together).about["notes"])
    assert not any("err together" in note for note in law(.01 * g.permutation(together / .01)).about["notes"])
