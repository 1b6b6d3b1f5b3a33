"One call measures everything, says what is missing and why, and leaves a record that other tools can read."
import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

import sae_nb.suite
from sae_nb.acts import Stream
from sae_nb.core import Estimate, UserError, read_json
from sae_nb.lm import LM, load_lm
from sae_nb.metrics import splice
from sae_nb.probes import Tasks
from sae_nb.sae import SAE, Dictionary, SAEConfig, init_
from sae_nb.suite import MEANING, Amounts, Evaluation, evaluate
from sae_nb.text import Document, Text, load_text

SITE = "resid_post.1"
TINY = Amounts(tokens=3_000, downstream=1_500, probe_rows=4_000, examples=4_000, build=2, longest=2, scored=1_500, rescaled=2_000, compared=16, positions=2, refined=512)
NAMES = {"nmse", "ce_recovered", "kl", "compute_equivalent", "probe_loss", "n2g_precision", "n2g_recall", "n2g_f1", "explanation_ce", "ablation_sparsity", "shrinkage", "progressive"}


@pytest.fixture(scope="module")
def lm(): return load_lm("pylib-64", "cpu", "float32")


@pytest.fixture(scope="module")
def sae(lm):
    rows = next(Stream(lm, load_text("pylib"), SITE, 64, 4_096).blocks()).read()
    return init_(SAE(SAEConfig(d=64, n=96, k=6, site=SITE, context=64)), rows).requires_grad_(False)


@pytest.fixture(scope="module")
def found(lm, sae): return evaluate(sae, lm, "pylib", suite=TINY)


def words(count, words="the cat sat on a mat and looked at the dog . "):
    "A text that is no Python."
    docs = [Document(f"w{i}", words * count) for i in range(8)]
    return Text("words", lambda: iter(docs), lambda i, d: i % 2 == 1)


def test_every_name_of_the_contract_has_a_figure(found):
    assert NAMES <= set(found.metrics) == set(MEANING)
    for name, e in found.metrics.items(): assert e.value is not None, (name, e.settings)


def test_figures_have_intervals_nulls_and_settings(found):
    for name in NAMES:
        e = found.metrics[name]
        assert e.low <= e.value <= e.high and e.nulls and "seed" in e.settings, name
    assert found.settings["seed"] == 0 and found.settings["tokens"] == 3_000 and set(found.seconds) == {s.__name__ for s in sae_nb.suite.STAGES}


def test_tables_count_as_much_text_as_explanations_see(found):
    "Rows from which examples come and on which they are rescaled, no more; pooled figures stand beside the means."
    counted = found.metrics["explanation_ce"].settings["counted"]
    assert set(counted) == {"bigram", "trigram"} and all(5_900 <= n <= 6_100 for n in counted.values())
    pooled = found.metrics["n2g_pooled_precision"], found.metrics["n2g_pooled_recall"]
    assert all(e.settings["unit"] == "documents" and set(e.nulls) == {"shuffled", "untrained", "channels"} for e in pooled)
    assert pooled[0].value != pooled[1].value and found.metrics["n2g_f1"].settings["unit"] == "latents"


def test_the_file_is_strict_json_with_the_keys_of_the_contract(found, tmp_path):
    found.save(tmp_path / "evaluation.json")
    read = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert NAMES <= set(read["metrics"]) and {"settings", "seconds"} <= set(read)
    for e in read["metrics"].values(): assert set(e) == {"value", "low", "high", "nulls", "settings"} and isinstance(e["nulls"], dict)
    assert Evaluation.load(tmp_path / "evaluation.json").metrics == found.metrics


def test_a_second_run_gives_the_same_figures(lm, sae, found):
    again = evaluate(sae, lm, "pylib", suite=TINY)
    assert json.dumps({n: e.to_dict() for n, e in again.metrics.items()}) == json.dumps({n: e.to_dict() for n, e in found.metrics.items()})
    assert again.settings == found.settings


def test_another_seed_draws_other_windows(lm, sae, found):
    "Every drawn figure moves with the seed, and each stays in the other's neighbourhood."
    other = evaluate(sae, lm, "pylib", suite=TINY, seed=5).metrics
    for name in ("nmse", "ce_recovered", "ablation_sparsity", "shrinkage", "probe_loss"):
        one, two = found.metrics[name], other[name]
        assert one.value != two.value, name
        if name == "nmse": assert abs(one.value - two.value) < 2 * (one.high - one.low + two.high - two.low)


class Foreign:
    "An SAE with dense codes that tells nothing of itself."
    def __init__(self, sae): self.sae = sae
    def encode(self, rows): code = self.sae.encode(rows); return code.dense(), code.normed
    def decode(self, code, normed): return normed.restore(code @ self.sae.W_dec + self.sae.b_dec)


def test_any_object_with_encode_and_decode_gets_the_same_figures(lm, sae, found):
    other = evaluate(Foreign(sae), lm, "pylib", SITE, TINY, context=64).metrics
    for name in NAMES - {"probe_loss", "progressive"}:   # these two use pre-activations, which it does not tell
        assert other[name].value == pytest.approx(found.metrics[name].value, rel=1e-4, abs=1e-5), name
    assert all(other[name].value is not None for name in NAMES)


def test_text_without_python_has_no_probes_and_all_else(lm, sae):
    found = evaluate(sae, lm, words(60), suite=TINY).metrics
    assert found["probe_loss"].value is None and "Python" in found["probe_loss"].settings["missing"]
    assert all(found[n].value is not None for n in NAMES - {"probe_loss"})


def test_a_dictionary_that_never_fires_is_measured_or_marked(lm):
    class Silent:
        def encode(self, rows): return torch.zeros(len(rows), 12)
        def decode(self, code): return torch.zeros(len(code), 64)
    found = evaluate(Silent(), lm, "pylib", SITE, TINY, context=64).metrics
    assert found["dead_fraction"].value == 1 and found["l0"].value == 0 and found["nmse"].value > 1
    for name in ("n2g_precision", "n2g_recall", "n2g_f1", "ablation_sparsity", "shrinkage", "progressive"):
        assert found[name].value is None and found[name].settings["missing"], name


def test_a_model_whose_training_is_unknown_has_no_equivalent_but_takes_curves(lm, sae):
    stranger = LM(lm.model, lm.tokenizer, "stranger")
    small = replace(TINY, tokens=500, downstream=500, probe_rows=200)
    assert "curve" in evaluate(sae, stranger, "pylib", suite=small).metrics["compute_equivalent"].settings["missing"]
    curves = {"stranger": [(1e10, 9.), (1e12, 5.), (1e13, 3.)]}
    assert 0 < evaluate(sae, stranger, "pylib", suite=small, curves=curves).metrics["compute_equivalent"].value < 1


def test_interrupted_it_goes_on_behind_what_is_done(lm, sae, found, tmp_path, monkeypatch):
    keep = tmp_path / "partial.json"
    def stop(subject): raise KeyboardInterrupt
    stages = list(sae_nb.suite.STAGES.items())
    monkeypatch.setattr(sae_nb.suite, "STAGES", dict([stages[0], (stop, ())]))
    with pytest.raises(KeyboardInterrupt): evaluate(sae, lm, "pylib", suite=TINY, keep=keep)
    def not_again(subject): raise AssertionError("measured twice")
    not_again.__name__ = stages[0][0].__name__
    monkeypatch.setattr(sae_nb.suite, "STAGES", dict([(not_again, stages[0][1]), *stages[3:]]))
    went_on = evaluate(sae, lm, "pylib", suite=TINY, keep=keep).metrics
    assert went_on["nmse"] == found.metrics["nmse"] and went_on["shrinkage"] == found.metrics["shrinkage"]


@pytest.mark.parametrize("change, word", [(dict(suite="endless"), "quick"), (dict(site=None), "site"), (dict(site="resid_post.9"), "resid_post.9"),
                                          (dict(context=9_999), "context"), (dict(text="no/such/text.txt"), "text"), (dict(lm="no_such_model"), "no_such_model")])
def test_a_wrong_call_is_said_in_a_sentence(lm, sae, change, word):
    given = dict(sae=Foreign(sae), lm=lm, text="pylib", site=SITE, suite=TINY) | change
    with pytest.raises(UserError, match=word) as e: evaluate(**given)
    assert "\n" not in str(e.value)


def test_text_of_less_than_a_window_is_said(lm, sae):
    short = Text("short", lambda: iter([Document("a", "one two"), Document("b", "three four")]), lambda i, d: i == 1)
    with pytest.raises(UserError, match="text"): evaluate(sae, lm, short, suite=TINY)


# --- what is kept, and for what ----------------------------------------------------------------------

SMALL = Amounts(**{name: 300 for name in ("tokens", "downstream", "probe_rows", "examples", "scored", "rescaled", "refined")},
                build=1, longest=1, compared=1, positions=1)


@pytest.fixture
def first_stage(monkeypatch):
    "Only the first stage is run, so that a call is quick."
    monkeypatch.setattr(sae_nb.suite, "STAGES", dict(list(sae_nb.suite.STAGES.items())[:1]))


def other_sae(sae):
    "One of the same sizes with other weights."
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(3))
    return init_(SAE(sae.cfg), rows, seed=9).requires_grad_(False)


@pytest.mark.parametrize("change", ["weights", "foreign weights", "seed", "amounts", "text", "model", "curves", "context"])
def test_what_is_kept_is_used_for_the_same_thing_only(lm, sae, tmp_path, first_stage, change):
    "Something else with the same settings otherwise is measured anew, and gets its own figures."
    keep, how, text = tmp_path / "kept.json", dict(suite=SMALL), words(60)
    wrap = (lambda d: Foreign(d)) if change == "foreign weights" else (lambda d: d)
    if change == "foreign weights": how |= dict(site=SITE, context=64)
    first = evaluate(wrap(sae), lm, text, keep=keep, **how)
    again = evaluate(wrap(sae), lm, text, keep=keep, **how)
    assert again.metrics == first.metrics and again.seconds.keys() == first.seconds.keys()
    marked = {n: replace(e, value=-1.) for n, e in first.metrics.items()}
    replace(first, metrics=marked).save(keep)
    assert evaluate(wrap(sae), lm, text, keep=keep, **how).metrics["nmse"].value == -1, "the kept figures are used"
    if change == "model":
        lm = LM(deepcopy(lm.model), lm.tokenizer, lm.name)
        with torch.no_grad(): next(lm.model.parameters()).mul_(1.01)
    if change == "text": text = words(60, "the dog sat on a log and looked at the fog . ")
    how |= {"seed": dict(seed=1), "amounts": dict(suite=replace(SMALL, refined=301)), "curves": dict(curves={lm.name: [(1e9, 9.), (1e10, 3.)]}),
            "context": dict(context=48)}.get(change, {})
    measured = wrap(other_sae(sae) if "weights" in change else sae)
    other = evaluate(measured, lm, text, keep=keep, **how)
    assert other.metrics["nmse"].value > 0
    assert json.dumps(other.metrics["nmse"].to_dict()) == json.dumps(evaluate(measured, lm, text, **how).metrics["nmse"].to_dict())


def test_an_evaluation_that_was_changed_is_refused(found, tmp_path):
    "Any digit counts; the sentence names the file."
    path = tmp_path / "evaluation.json"
    found.save(path)
    whole = path.read_text()
    assert Evaluation.load(path).metrics == found.metrics
    for a, b in (('"low"', '"lou"'), ('"seed": 0', '"seed": 1'), ("0.9", "0.8")):
        path.write_text(whole.replace(a, b, 1))
        with pytest.raises(UserError, match="evaluation.json.*(damaged|digest)"): Evaluation.load(path)
    path.write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k != "digest"}))
    with pytest.raises(UserError, match="no digest"): Evaluation.load(path)


@pytest.mark.parametrize("content", ["{}", '{"a": 1}', "[]", "no json", ""])
def test_a_file_that_is_no_evaluation_is_not_overwritten(lm, sae, tmp_path, content):
    keep = tmp_path / "mine.json"
    keep.write_text(content)
    with pytest.raises(UserError, match="mine.json"): evaluate(sae, lm, words(60), suite=SMALL, keep=keep)
    assert keep.read_text() == content


@pytest.mark.parametrize("name", ["tokens", "positions", "refined"])
def test_amounts_are_at_least_one(name):
    with pytest.raises(UserError, match=name): replace(TINY, **{name: 0})


# --- the stages, on planted differences --------------------------------------------------------------

def sides(held, seen):
    "A text whose held-out side is other text than its training side."
    docs = [Document(f"d{i}", (held if i % 2 else seen) * 60) for i in range(24)]
    return Text("sides", lambda: iter(docs), lambda i, d: i % 2 == 1)


def subject(sae, lm, text, tasks=(), size=TINY):
    return sae_nb.suite.subject(sae, lm, text, None, size, 0, 0, None, tasks, lambda what, loop, turns: loop)


def test_shrinkage_and_cuts_are_measured_on_held_out_text(lm, sae, monkeypatch):
    "Rows of the held-out side, and of all its documents."
    s = subject(sae, lm, sides("def f(x):\n    return x + 1\n", "the cat sat on the mat . "))
    given = []
    keep = lambda f: lambda sae, rows, *more: (given.append(rows), f(sae, rows, *more))[1]
    for name in ("shrinkage", "progressive"): monkeypatch.setattr(sae_nb.suite, name, keep(getattr(sae_nb.suite, name)))
    sae_nb.suite.refining(s)
    held, seen = s.rows(True, 512), s.rows(False, 512)
    distance = lambda rows, others: torch.cdist(rows[:100], others).amin(1).mean().item()
    assert len(given) == 4
    for rows in given: assert torch.equal(rows, held) and distance(rows, seen) > 2


def test_the_untrained_null_has_as_many_active_latents(lm, sae):
    "Also of an object that says nothing of itself; another seed is another start."
    s = subject(sae, lm, words(60), size=SMALL)
    rows, null = s.rows(True, 300), lambda thing, seed: sae_nb.suite.random_sae(Dictionary(thing, s.rows(True, 300)), s.rows(True, 300), seed)
    mine, foreign, other = null(sae, 0), null(Foreign(sae), 0), null(sae, 1)
    for n in (mine, foreign, other): assert n.cfg.n == 96 and (n.encode(rows).values > 0).sum(1).double().mean() == pytest.approx(6, abs=.1)
    assert not torch.equal(mine.W_enc, other.W_enc) and not torch.equal(mine.W_enc, sae.W_enc)


def test_ablations_are_computed_in_single_precision(lm, sae, monkeypatch):
    "A model in half precision is read by a copy; it stays as it is."
    half = LM(deepcopy(lm.model).bfloat16(), lm.tokenizer, lm.name)
    used = []
    monkeypatch.setattr(sae_nb.suite, "ablation_sparsity", lambda sae, lm, *given, **how: used.append((lm.dtype, how["seed"], how["null"], how["everywhere"])))
    s = replace(subject(sae, lm, words(60), size=SMALL), lm=half, seed=3)
    sae_nb.suite.ablating(s)
    assert used == [(torch.float32, 3, s.null, False), (torch.float32, 3, s.null, True)] and half.dtype == torch.bfloat16


def test_cuts_are_compared_with_an_untrained_sae_and_with_any_order(lm, sae, monkeypatch):
    asked, whole = [], sae_nb.suite.progressive
    def progressive(sae, rows, ks, context, shuffled, seed):
        asked.append((sae, shuffled))
        return whole(sae, rows, ks, context, shuffled, seed)
    monkeypatch.setattr(sae_nb.suite, "progressive", progressive)
    s = subject(sae, lm, words(60), size=SMALL)
    found = sae_nb.suite.refining(s)["progressive"]
    assert asked == [(s.sae, False), (s.null, False), (s.sae, True)] and len(set(found.nulls.values())) == len(found.nulls) >= 2


def test_figures_are_of_the_held_out_side(lm, sae):
    "An SAE of the training side measured where the sides differ: the figure is that of the other side's rows."
    s = subject(sae, lm, sides("def f(x):\n    return x + 1\n", "the cat sat on the mat . "))
    whole = {side: s.rows(side, 3_000) for side in (True, False)}
    error = {side: ((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()).item() for side, x in whole.items()}
    got = sae_nb.suite.reconstruction(s)["nmse"]
    assert abs(error[True] - error[False]) > .05 and got.value == pytest.approx(error[True], abs=.02)


def test_the_first_stage_is_one_pass_of_splice(lm, sae):
    "Figures and nulls by name against the pass itself; curves of a family and of the model alone differ."
    s = replace(subject(sae, lm, words(60), size=SMALL), curves={lm.name: [(1e9, 12.), (4e9, 7.), (1e10, 3.)], "other": [(1e8, 9.), (2e9, 4.)]})
    m, seen = sae_nb.suite.reconstruction(s), splice(sae, lm, s.text, SITE, 64, 300, 300, null=s.null)
    own, null = seen.sums["sae"], seen.sums["null"]
    for name, value, beside in (("nmse", own.nmse, null.nmse), ("nmse_normalised", own.nmse_normalised, null.nmse_normalised),
                                ("ce_increase", seen.against("sae").value, seen.against("null").value), ("kl", seen.divergence().value, seen.divergence("null").value),
                                ("ce_recovered", seen.recovered().value, seen.recovered("null").value), ("dead_fraction", own.dead, null.dead), ("l0", own.l0, null.l0)):
        assert m[name].value == pytest.approx(value, rel=1e-6) and m[name].nulls["untrained"] == pytest.approx(beside, rel=1e-6), name
        assert name in ("dead_fraction", "l0") or value != beside, name
    assert m["ce_recovered"].nulls["mean row"] == pytest.approx(seen.recovered("mean").value, rel=1e-6)
    assert m["compute_equivalent"].value < m["compute_equivalent_own"].value == pytest.approx(m["compute_equivalent"].settings["own_curve"])


def test_rows_far_out_are_left_out_of_all_stages(lm, sae, monkeypatch):
    "With a limit that cuts off the longer rows, none of them is measured, and the settings say how many were left out."
    whole = subject(sae, lm, words(60)).rows(True, 400).norm(dim=-1)
    limit = whole.quantile(.7).item()
    monkeypatch.setattr(sae_nb.suite, "norm_limit", lambda *given: limit)
    s = subject(sae, lm, words(60), size=SMALL)
    assert s.rows(True, 200).norm(dim=-1).max() <= limit < whole.max()
    m = sae_nb.suite.reconstruction(s)
    assert m["nmse"].settings["left_out"] > 50 and m["nmse"].settings["limit"] == limit


def test_the_shuffled_null_of_probes_has_lost_the_answers(lm, sae):
    "Questions that a latent tells: shuffled, nothing beats the base rate by more than a little."
    rows = subject(sae, lm, load_text("pylib")).rows(True, 3_000)
    z = sae.pre(rows)
    tasks = Tasks(["a", "b"], rows, z[:, :2] > z[:, :2].median(0).values, torch.arange(len(rows)) // 30)
    e = sae_nb.suite.probing(subject(sae, lm, load_text("pylib"), [tasks]))["probe_loss"]
    assert e.value < .1 and e.nulls["shuffled"] > .67 and e.nulls["base rate"] == pytest.approx(.693, abs=.01)


def test_the_figures_of_a_pass_carry_what_they_rest_on(found):
    "Rows with the dead share, units with every interval of the pass, both equivalents."
    m = found.metrics
    assert m["dead_fraction"].settings["tokens"] >= 3_000 and len(m["dead_fraction"].settings["silent_by_rows"]) >= 3
    for name in ("nmse", "nmse_normalised", "ce_increase", "ce_recovered", "kl", "probe_loss"):
        assert m[name].settings["unit"] == "documents" and "training" in m[name].settings["not_in_it"], name
    for name in ("compute_equivalent", "compute_equivalent_own"): assert "curve" in m[name].settings["not_in_it"]
    assert m["nmse"].settings["left_out"] == 0 and m["nmse"].value != m["nmse_normalised"].value
    assert m["dead_limit"].value <= m["dead_fraction"].value


@pytest.mark.parametrize("content", ["{}", '{"metrics": {"nmse": 3}, "settings": {}, "seconds": {}}', "not json"])
def test_a_damaged_record_is_said(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(UserError, match="evaluation.json"): Evaluation.load(tmp_path / "evaluation.json")


def test_missing_figures_show_their_reason():
    e = Evaluation({"kl": Estimate.missing("no text")}, {}, {})
    assert "no text" in repr(e) and "no text" in e._repr_markdown_()


# --- the command -------------------------------------------------------------------------------------

def test_eval_suite_writes_the_record(sae, tmp_path, capfd, monkeypatch):
    from sae_nb.cli import main
    from sae_nb.runs import RunConfig
    sae.save(tmp_path)
    cfg = RunConfig(lm="pylib-64", site=SITE, n=96, k=6, tokens=1_000, context=64, dtype="float32", device="cpu")
    (tmp_path / "config.json").write_text(json.dumps({"run": cfg.to_dict(), "train": {}, "d": 64}))
    monkeypatch.setitem(sae_nb.suite.SUITES, "quick", TINY)
    assert main(["eval", str(tmp_path), "--suite", "quick", "--device", "cpu", "--seed", "5"]) == 0
    out = capfd.readouterr().out
    first = read_json(tmp_path / "evaluation.json")
    assert first["settings"]["seed"] == 5
    assert NAMES <= set(first["metrics"]) and "n2g_f1" in out and not (tmp_path / "evaluation.partial.json").exists()
    (tmp_path / ".evaluation.partial.json.999999999.sae_nb-tmp").write_text("half")   # of an evaluation that was killed
    (tmp_path / "curves.csv").write_text("model,flops,loss\npylib-64,1e12,9\npylib-64,1e14,3\n")
    assert main(["eval", str(tmp_path), "--suite", "quick", "--device", "cpu", "--seed", "5", "--curves", str(tmp_path / "curves.csv")]) == 0
    assert not list(tmp_path.glob(".*.sae_nb-tmp"))
    second = read_json(tmp_path / "evaluation.json")
    assert second["metrics"]["compute_equivalent"] != first["metrics"]["compute_equivalent"]
    rest = [{n: e for n, e in x["metrics"].items() if not n.startswith("compute_equivalent")} for x in (first, second)]
    assert rest[0] == rest[1] and len(rest[0]) == len(MEANING) - 2
    capfd.readouterr()
    for bad in ("missing.csv", "config.json"):
        assert main(["eval", str(tmp_path), "--suite", "quick", "--device", "cpu", "--curves", str(tmp_path / bad)]) == 2
        assert capfd.readouterr().err.count("\n") <= 2
