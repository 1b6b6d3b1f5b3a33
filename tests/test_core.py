"Files, digests and locks: strict, whole, and told from one another."
import json, math, os, stat, subprocess, sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import SafetensorError
from sae_nb.core import (Config, Estimate, UserError, digest, generator, is_memory, lock, plain, read_json, room_for, same, setting, short,
                         sweep_leftovers, to_json, write_atomic, write_json)

numbers = st.floats() | st.integers() | st.booleans() | st.none()
trees = st.recursive(numbers | st.text(), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3))


def refuse(constant): raise AssertionError(f"{constant} is no JSON")


@given(trees)
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_strict_json(tree):
    text = to_json({"tree": tree})
    assert json.loads(text, parse_constant=refuse).keys() == {"tree"}


def test_numbers_of_other_libraries_become_plain():
    given = {"i": np.int64(3), "f": np.float32(.5), "t": torch.tensor(2), "a": np.arange(2), "nan": np.float64("nan"), "b": np.bool_(True)}
    assert json.loads(to_json(given)) == {"i": 3, "f": .5, "t": 2, "a": [0, 1], "nan": None, "b": True}
    assert short(np.float64(.123456)) == "0.1235" and short(torch.tensor(1000)) == "1,000"
    assert type(plain(np.int32(1))) is int and type(plain(torch.tensor(1.))) is float


@dataclass(frozen=True)
class Sizes(Config):
    n:int = setting(1, "latents")
    lr:float = setting(.1, "rate")
    name:str = setting("", "a path")
    how:str = setting("raw", "a way", choices=("raw", "normed"))


def test_settings_take_numbers_of_numpy_and_paths():
    got = Sizes(n=np.int64(4), lr=np.float32(.5), name=Path("a") / "b")
    assert got == Sizes(4, .5, os.path.join("a", "b")) and type(got.n) is int and type(got.lr) is float and type(got.name) is str
    assert Sizes(n=4.0).n == 4
    for bad in (dict(n=True), dict(n=2.5), dict(lr=math.nan), dict(lr="1"), dict(n=None), dict(lr=10**400)):
        with pytest.raises(UserError): Sizes(**bad)
    for bad in (dict(n=10**5_000), dict(n=-2**63), dict(n=1e30), dict(lr=10**5_000)):
        with pytest.raises(UserError, match=f"{next(iter(bad))} .*too large"): Sizes(**bad)
    assert Sizes(n=2**63 - 1, lr=10**299).n == 2**63 - 1
    with pytest.raises(UserError, match="how is 'other': choose one of raw, normed"): Sizes(how="other")


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"null",
                                     b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}"],
                         ids=["empty", "list", "cut", "not UTF-8", "deep", "long number", "null", "readable and too deep to be used"])
def test_a_bad_file_is_one_sentence(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="x.json") as e: read_json(path)
    assert len(str(e.value).splitlines()) == 1
    with pytest.raises(UserError, match="does not exist"): read_json(tmp_path / "y.json")
    with pytest.raises(UserError, match="cannot be read"): read_json(tmp_path)


def test_a_digest_takes_any_view():
    x = torch.arange(12.).view(3, 4)
    for view in (x[:1, ::4], x[1, 1], x[:, ::3], x.T, x[:0], x[2:, 3:].bfloat16(), x.expand(2, 3, 4)):
        assert digest({"x": view}) == digest({"x": view.clone(memory_format=torch.contiguous_format)})


def test_a_digest_tells_name_kind_shape_order_and_every_bit():
    x = torch.arange(6.)
    flipped = x.clone().view(torch.int32)
    flipped[3] ^= 1
    made = [dict(a=x), dict(b=x), dict(a=x.view(2, 3)), dict(a=x.double()), dict(a=x.flip(0)), dict(a=flipped.view(torch.float32)),
            dict(a=x, b=x), dict(a=x, b=-x), dict(a=-x, b=x)]
    assert len({digest(m) for m in made}) == len(made)
    assert digest("ab", "c") != digest("a", "bc") != digest("abc") and digest("1") != digest(1) and digest(b"1") != digest("1")
    assert digest(dict(a=x.numpy())) == digest(dict(a=x)) == digest(dict(a=x.view(2, 3).T.T.reshape(6)))
    assert digest(dict(a=1, b=2)) == digest(dict(b=2, a=1)) and digest({"a": torch.tensor(1.)}) != digest({"a": torch.tensor(2.)})
    assert digest({"x": x.bfloat16()}) != digest({"x": x.half()}) and digest({"x": torch.zeros(0, 3)}) != digest({"x": torch.zeros(3, 0)})


def test_a_digest_tells_types_of_equal_bytes_and_where_texts_end():
    assert digest({"x": torch.zeros(3)}) != digest({"x": torch.zeros(3, dtype=torch.int32)})
    assert digest({"x": np.zeros(3)}) != digest({"x": np.zeros(3, dtype=np.int64)})
    assert digest("asb") != digest("a", "b") and digest(b"a", b"") != digest(b"ab")


def test_every_part_of_a_key_draws_other_numbers():
    drawn = lambda *key: torch.rand(4, generator=generator(*key)).tolist()
    keys = [(0, "a"), (1, "a"), (0, "b"), (0,), ("a",), (0, "a", 1)]
    assert len({tuple(drawn(*k)) for k in keys}) == len(keys) and drawn(3, "x") == drawn(3, "x")


def test_what_differs_is_named():
    same("the run", dict(a=1, b=2), dict(a=1, b=2, c=3), "stop")
    with pytest.raises(UserError, match="the run differs in b, d: stop"): same("the run", dict(a=1, b=2, d=4), dict(a=1, b=3), "stop")


def test_files_have_the_permissions_that_the_user_gives_to_new_files(tmp_path):
    code = "import os; os.umask(0o027)\nfrom sae_nb.core import write_atomic\nwrite_atomic('f', lambda p: os.close(os.open(p, os.O_CREAT | os.O_WRONLY, 0o600)))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=True)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


def test_only_leftovers_of_ended_processes_of_ours_are_removed(tmp_path):
    inner, outside = tmp_path / "inner", tmp_path / "outside"
    inner.mkdir(); outside.mkdir()
    foreign = [".x.tmp", ".a.1.tmp", "notes.999999999.sae_nb-tmp", f".live.{os.getpid()}.sae_nb-tmp", ".x.sae_nb-tmp"]
    for name in [*foreign, ".dead.999999999.sae_nb-tmp"]: (inner / name).touch()
    (outside / ".dead.999999999.sae_nb-tmp").touch()
    (tmp_path / "link").symlink_to(outside)
    sweep_leftovers(inner); sweep_leftovers(tmp_path / "link")
    assert sorted(p.name for p in inner.iterdir()) == sorted(foreign) and len([*outside.iterdir()]) == 1


def test_a_write_clears_away_what_a_killed_write_of_the_same_file_left(tmp_path):
    "Through a linked folder too; what is of another file, of a living process or no mark of ours stays."
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    stay = [".f.json.tmp", ".g.json.999999999.sae_nb-tmp", ".f.json.1.sae_nb-tmp"]
    for place in (folder, tmp_path / "link"):
        for name in [*stay, ".f.json.999999999.sae_nb-tmp"]: (folder / name).touch()
        write_json(place / "f.json", {"a": 1})
        assert sorted(p.name for p in folder.iterdir()) == sorted([*stay, "f.json"])


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "f.json"
    write_json(path, {"a": 1})
    def fail(tmp): tmp.write_text("half"); raise OSError(28, "No space left on device")
    def also(tmp): tmp.write_text("half"); raise SafetensorError("Error while serializing: No space left")
    for failing in (fail, also):
        with pytest.raises(UserError, match="f.json cannot be written .*No space left.*disk"): write_atomic(path, failing)
    assert read_json(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["f.json"]
    for below in (path / "g.json", path / "deeper/g.json"):
        with pytest.raises(UserError, match="g.json cannot be written"): write_json(below, {})
    with pytest.raises(UserError, match="f.json cannot be written"), lock(path): pass


def test_what_is_nested_like_our_own_files_is_read(tmp_path):
    content = {"a": 1}
    for _ in range(40): content = {"a": [content]}
    write_json(tmp_path / "f.json", content)
    assert read_json(tmp_path / "f.json") == content


def test_a_full_memory_is_known_by_what_is_said():
    torch_says = RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    assert is_memory(MemoryError()) and is_memory(torch_says) and is_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_memory(RuntimeError("shapes differ")) and not is_memory(OSError("out of memory"))


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path):
    code = "from sae_nb.core import lock, UserError\ntry:\n    with lock('.'): print('mine')\nexcept UserError as e: print(e)"
    other = lambda: subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                                   capture_output=True, text=True, check=True).stdout.strip()
    with lock(tmp_path): assert "in use by another process" in other()
    assert other() == "mine"


def test_memory_is_asked_for_before_it_is_taken():
    room_for(1000, "ten rows")
    with pytest.raises(UserError, match="ten rows need .* are free: choose fewer"): room_for(10**15, "ten rows")


def test_an_interval_counts_units_not_their_parts():
    units = np.stack([np.r_[np.zeros(8), np.ones(8)], np.ones(16)], 1)
    wide, narrow = Estimate.of(units), Estimate.of(np.repeat(units, 9, 0))
    assert wide.value == narrow.value == .5
    assert abs((wide.high - wide.low) / (narrow.high - narrow.low) - 3) < .4
    assert Estimate.of(units, seed=1) == Estimate.of(units, seed=1) and Estimate.of(units, seed=1).low is not None
    uneven = np.stack([np.linspace(0, 1, 40) ** 3, np.ones(40)], 1)
    assert len({(e.low, e.high) for e in (Estimate.of(uneven, seed=s) for s in range(4))}) == 4   # the seed draws
