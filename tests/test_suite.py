"One call measures everything, says what is missing and why, and leaves a record that other tools can read."
import json
from dataclasses import replace

import pytest
import torch

import sae_nb.suite
from sae_nb.acts import Stream
from sae_nb.core import Estimate, UserError, read_json
from sae_nb.lm import load_lm
from sae_nb.sae import SAE, SAEConfig, init_
from sae_nb.suite import MEANING, Amounts, Evaluation, evaluate
from sae_nb.text import Document, Text, load_text

SITE = "resid_post.1"
TINY = Amounts(tokens=3_000, downstream=1_500, probe_rows=4_000, examples=4_000, build=2, longest=2, scored=1_500, rescaled=2_000, bigrams=10_000, compared=16, positions=2, refined=512)
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


def test_another_seed_changes_draws_and_not_sums(lm, sae, found):
    other = evaluate(sae, lm, "pylib", suite=TINY, seed=5).metrics
    assert other["nmse"].value == found.metrics["nmse"].value and other["ce_recovered"].value == found.metrics["ce_recovered"].value
    assert other["ablation_sparsity"].value != found.metrics["ablation_sparsity"].value and other["nmse"].low != found.metrics["nmse"].low


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
    from sae_nb.lm import LM
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
    assert main(["eval", str(tmp_path), "--suite", "quick", "--device", "cpu"]) == 0
    out = capfd.readouterr().out
    first = read_json(tmp_path / "evaluation.json")
    assert NAMES <= set(first["metrics"]) and "n2g_f1" in out and not (tmp_path / "evaluation.partial.json").exists()
    (tmp_path / "curves.csv").write_text("model,flops,loss\npylib-64,1e12,9\npylib-64,1e14,3\n")
    assert main(["eval", str(tmp_path), "--suite", "quick", "--device", "cpu", "--curves", str(tmp_path / "curves.csv")]) == 0
    second = read_json(tmp_path / "evaluation.json")
    assert second["metrics"]["compute_equivalent"] != first["metrics"]["compute_equivalent"]
    assert {n: e for n, e in second["metrics"].items() if n != "compute_equivalent"} == {n: e for n, e in first["metrics"].items() if n != "compute_equivalent"}
    capfd.readouterr()
    for bad in ("missing.csv", "config.json"):
        assert main(["eval", str(tmp_path), "--suite", "quick", "--device", "cpu", "--curves", str(tmp_path / bad)]) == 2
        assert capfd.readouterr().err.count("\n") <= 2
