import json

import pytest

from posjax.training.records import Records, read_records, write_json

LINE = {"loss": 1.0, "gradient_norm": 2.0, "learning_rate": 0.1, "tokens_per_second": 5.0}


def steps(directory):
    return [(line["step"], "loss" in line) for line in read_records(directory)]


def test_lines_after_the_restored_step_are_dropped(tmp_path):
    records = Records(tmp_path, 0, last=6)
    for step in (2, 4, 6):
        records.train(step, LINE)
    records.evaluation(6, {"dense": {"token_error": 0.5}, "sparse": None})
    records.close()
    assert steps(tmp_path) == [(2, True), (4, True), (6, True), (6, False)]

    records = Records(tmp_path, 4, last=6)
    records.train(6, LINE)
    records.close()
    assert steps(tmp_path) == [(2, True), (4, True), (6, True)]


def test_the_last_evaluation_is_made_again_but_earlier_ones_are_kept(tmp_path):
    records = Records(tmp_path, 0, last=4)
    for step in (2, 4):
        records.train(step, LINE)
        records.evaluation(step, {"dense": None})
    records.close()
    Records(tmp_path, 4, last=4).close()
    assert steps(tmp_path) == [(2, True), (2, False), (4, True)]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, **LINE}) + '\n{"step": 2, "lo')
    assert steps(tmp_path) == [(1, True)]
    records = Records(tmp_path, 2, last=9)
    records.train(3, LINE)
    records.close()
    assert steps(tmp_path) == [(1, True), (3, True)]
    assert not list(tmp_path.glob(".*"))


def test_tensorboard_has_files(tmp_path):
    records = Records(tmp_path, 0, last=9)
    records.train(1, LINE)
    records.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_json_files_hold_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
