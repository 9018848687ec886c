import hashlib
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posjax.tasks import corpus as module
from posjax.tasks.corpus import load_corpus


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "root"
    for number in range(20):
        file = root / f"part{number % 3}" / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes([number]) * 50)
    return root


def names(files) -> set[str]:
    return {file.name for file in files}


def test_no_file_is_on_both_sides(folder):
    corpus = load_corpus((str(folder),), validation_fraction=0.25)
    assert len(corpus.train_files) == 15
    assert len(corpus.validation_files) == 5
    assert not names(corpus.train_files) & names(corpus.validation_files)
    held_out = {int(name.removesuffix(".txt")) for name in names(corpus.validation_files)}
    assert set(corpus.validation.tolist()) == held_out
    assert set(corpus.train.tolist()) == set(range(20)) - held_out
    assert corpus.train.dtype == corpus.validation.dtype == np.uint8
    assert corpus.train.size + corpus.validation.size == 1000


def test_names_alone_decide_the_split(folder):
    corpus = load_corpus((str(folder),), validation_fraction=0.25)
    relative = [file.relative_to(folder.resolve()).as_posix() for file in corpus.validation_files]
    everything = [file.relative_to(folder).as_posix() for file in folder.rglob("*.txt")]
    order = sorted(everything, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert relative == order[:5]
    moved = folder.rename(folder.parent / "elsewhere")
    again = load_corpus((str(moved),), validation_fraction=0.25)
    assert np.array_equal(again.train, corpus.train)
    assert np.array_equal(again.validation, corpus.validation)


@given(
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=20),
    fraction=st.floats(0.01, 0.99),
)
def test_what_is_held_out_fits_the_budget(sizes, fraction):
    budget = sum(sizes) * fraction
    taken = module._hold_out(sizes, budget)
    used = sum(sizes[i] for i in taken)
    assert taken
    assert used <= budget or list(taken) == [sizes.index(min(sizes))]
    assert all(used + size > budget for i, size in enumerate(sizes) if i not in taken)


@pytest.mark.parametrize(
    ("size", "fraction", "train"), [(100, 0.1, 90), (100, 0.999, 1), (5, 0.1, 4), (1, 0.5, 0)]
)
def test_a_single_file_is_cut(tmp_path, size, fraction, train):
    file = tmp_path / "book"
    file.write_bytes(bytes(range(size)))
    corpus = load_corpus((str(file),), validation_fraction=fraction)
    assert corpus.train.tolist() == list(range(train))
    assert corpus.validation.tolist() == list(range(train, size))


def test_two_files_are_kept_whole(tmp_path):
    (tmp_path / "long").write_bytes(b"a" * 90)
    (tmp_path / "short").write_bytes(b"b" * 30)
    corpus = load_corpus((str(tmp_path),))
    assert names(corpus.validation_files) == {"short"}
    assert bytes(corpus.train) == b"a" * 90


def test_hidden_and_empty_files_are_left_out_and_suffixes_choose(folder):
    (folder / ".git").mkdir()
    (folder / ".git" / "object.txt").write_bytes(b"hidden")
    (folder / ".secret.txt").write_bytes(b"hidden")
    (folder / "empty.txt").touch()
    (folder / "picture.png").write_bytes(b"\x89PNG")
    everything = load_corpus((str(folder),))
    assert len(everything.train_files + everything.validation_files) == 21
    texts = load_corpus((str(folder),), (".md", ".txt"))
    assert len(texts.train_files + texts.validation_files) == 20
    named = load_corpus((str(folder / ".secret.txt"), str(folder)), (".png",))
    assert names(named.train_files + named.validation_files) == {".secret.txt", "picture.png"}


def test_a_file_named_twice_is_read_once(folder):
    twice = (str(folder), str(folder / "part0"), str(folder / "part0" / "0.txt"))
    (folder / "link.txt").symlink_to(folder / "part1" / "1.txt")
    corpus = load_corpus(twice)
    assert corpus.train.size + corpus.validation.size == 1000


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert load_corpus(("~/part0",)).train.size == 300


def test_broken_links_are_left_out(folder):
    (folder / "broken.txt").symlink_to(folder / "nowhere")
    assert len(load_corpus((str(folder),)).train_files) == 18


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "it must be a file or a folder"),
        ("empty", "it must be one with bytes in files.$"),
        ("hollow.txt", "it must be one with bytes in files.$"),
        ("root", r"it must be one with bytes in files ending in \.md or \.rst"),
    ],
)
def test_bad_paths_are_named(folder, name, words):
    (folder.parent / "empty").mkdir()
    (folder.parent / "hollow.txt").touch()
    path = str(folder.parent / name)
    suffixes = (".md", ".rst") if name == "root" else ()
    with pytest.raises(ValueError, match=words) as error:
        load_corpus((str(folder / "part0" / "0.txt"), path), suffixes)
    assert f"entry of path is {path!r}" in str(error.value)


def test_default_leaves_out_what_is_no_library():
    corpus = load_corpus(())
    root = Path(sysconfig.get_paths()["stdlib"])
    relative = [f.relative_to(root) for f in corpus.train_files + corpus.validation_files]
    assert {file.suffix for file in relative} == {".py"}
    folders = {part for file in relative for part in file.parts[:-1]}
    assert {"asyncio", "json"} <= folders
    assert not folders & {"test", "tests", "idlelib", "site-packages", "encodings", "__pycache__"}
    share = corpus.validation.size / (corpus.validation.size + corpus.train.size)
    assert 0.09 < share <= 0.1


def test_no_standard_library_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"path is not given.*--data\.path"):
        load_corpus(())
