"""Evaluations that are measured unit by unit: continued, shared by processes, reported with intervals."""

import json
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.nearness import Nearness, write_images
from tests.folders import files
from tests.paths import ROOT
from tests.tiny import grounded, picture
from visual_ground import evaluate
from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.evaluation import Evaluator
from visual_ground.evaluation.running.bootstrap import bootstrap_intervals
from visual_ground.evaluation.running.plan import Plan, Scores
from visual_ground.evaluation.running.prompts import answer_prompts, embed_prompts
from visual_ground.evaluation.running.task import Evaluation, Task
from visual_ground.evaluation.tasks.registry import TASKS, load_task


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "data", [f"{i}.png" for i in range(7)])
    (tmp_path / "data" / "words.json").write_text("[]")
    return tmp_path / "data"


def test_a_stopped_evaluation_goes_on_with_the_same_report(folder, tmp_path):
    model, calls = grounded(), []
    whole = evaluate(model, Nearness(folder), work_dir=tmp_path / "one", batch_size=2, progress=False)
    for stop in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, Nearness(folder, calls, stop), work_dir=tmp_path / "two", batch_size=2, progress=False)
    continued = evaluate(model, Nearness(folder, calls), work_dir=tmp_path / "two", batch_size=2, progress=False)
    assert continued.to_json() == whole.to_json() and calls == [[0, 1], [2, 3], [4, 5], [6]]
    again = evaluate(model, Nearness(folder, calls), work_dir=tmp_path / "two", batch_size=2, progress=False)
    assert again.to_json() == whole.to_json() and len(calls) == 4, "nothing is measured twice"
    nothing_kept = evaluate(model, Nearness(folder), batch_size=2, progress=False)
    assert nothing_kept.to_json() == whole.to_json()


def test_what_a_killed_process_left_half_written_is_measured_again(folder, tmp_path):
    model, calls = grounded(), []
    whole = evaluate(model, Nearness(folder), batch_size=2, progress=False).to_json()
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, Nearness(folder, calls, 2), work_dir=tmp_path / "w", batch_size=2, progress=False)
    records = next((tmp_path / "w").glob("nearness-*"))
    with open(records / "records.jsonl", "ab") as file:
        file.write(b'{"nearness": 0.')
    with open(records / "index.jsonl", "ab") as file:
        file.write(b'{"row": 4, "keys": ["4", ')
    report = evaluate(model, Nearness(folder, calls), work_dir=tmp_path / "w", batch_size=2, progress=False)
    assert report.to_json() == whole and calls == [[0, 1], [2, 3], [4, 5], [6]]


def test_records_are_those_of_one_adapter_and_one_way_of_measuring(folder, tmp_path):
    model, calls = grounded(), []
    evaluation = Evaluation(Nearness(folder, calls), tmp_path, batch_size=7)
    first = evaluation(model)
    model.adapter.ret_input.data.add_(1.0)
    assert evaluation(model) != first and len(calls) == 2
    Evaluation(Nearness(folder, calls), tmp_path, batch_size=3)(model)
    assert len(calls) == 5


def test_a_report_says_what_it_depends_on(folder, tmp_path):
    model = grounded()
    report = evaluate(model, Nearness(folder), batch_size=4, seed=3, progress=False)
    assert report.missing == {"images that are not there": ["absent"]}
    assert report.counts == {"units": 7, "words": 1} and report.settings == {
        "batch_size": 4,
        "seed": 3,
        "samples": 1000,
    }
    low, high = report.intervals["nearness"]
    assert low <= report.metrics["nearness"] <= high and "units" not in report.intervals
    assert report.data.keys() == {"words.json"} and report.versions.keys() >= {"torch", "visual-ground"}
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()
    report.record(model)
    model.save_pretrained(tmp_path / "adapter")
    assert "| Nearness |  | 7 | Nearness | " in (tmp_path / "adapter" / "README.md").read_text()


def test_a_task_is_an_evaluator_and_leaves_the_mode_of_the_model(folder):
    model, task = grounded().train(), Nearness(folder)
    assert isinstance(task, Evaluator) and isinstance(Evaluation(task), Evaluator)
    assert task(model) == Evaluation(task)(model) and model.training


def test_a_damaged_image_is_left_out_and_named(folder):
    (folder / "3.png").write_bytes(b"no image")
    report = evaluate(grounded(), Nearness(folder), progress=False)
    assert report.missing["images that cannot be read"] == ["3"] and report.counts["units"] == 6


def test_numbers_that_are_not_finite_are_named(folder):
    model = grounded()
    model.adapter.ret_input.data.fill_(float("nan"))
    with pytest.raises(GroundingValueError, match="'0' is not finite.*nan"):
        evaluate(model, Nearness(folder), progress=False)


def test_nothing_to_measure_and_ids_that_come_twice(folder):
    for path in folder.glob("*.png"):
        path.unlink()
    with pytest.raises(GroundingValueError, match=r"nothing is left to measure \(1 images that are not there\)"):
        evaluate(grounded(), Nearness(folder), progress=False)
    with pytest.raises(GroundingValueError, match=r"come twice in the data: \['a'\]"):
        Plan(["a", "b", "a"], lambda numbers: []).check("task")
    with pytest.raises(GroundingValueError, match="batch_size must be at least 1, got 0"):
        Evaluation(Nearness(folder), batch_size=0)


def test_tasks_are_loaded_by_name_and_refuse_what_they_do_not_know(monkeypatch, folder):
    monkeypatch.setitem(TASKS, "nearness", "tests.evaluation.nearness:Nearness")
    with pytest.raises(GroundingValueError, match="no task 'nearnes'; there are .*nearness"):
        load_task("nearnes", folder)
    with pytest.raises(GroundingTypeError, match=r"no settings \['colour'\]; it has \['calls', 'folder', 'stop'\]"):
        load_task("nearness", colour="red")
    with pytest.raises(GroundingTypeError, match="takes no data="):
        load_task("nearness", folder)
    assert isinstance(load_task("nearness", folder=folder), Nearness)


def test_every_task_in_the_folders_has_a_name():
    found = set()
    for module in [import_module(f"visual_ground.{name}") for name in files() if name.startswith("evaluation.tasks.")]:
        own = [one for one in vars(module).values() if getattr(one, "__module__", None) == module.__name__]
        found |= {f"{module.__name__}:{one.__name__}" for one in own if Task in getattr(one, "__mro__", ())}
    assert found == set(TASKS.values())


def test_features_stand_for_images_in_prompts():
    model, images = grounded(), [picture(i) for i in range(3)]
    features = model.vision.encode(images)
    seen = [["w5", images[0], "w6", images[1]], "w7 w8", [images[2], "w9"]]
    known = [["w5", features[0], "w6", features[1]], "w7 w8", [features[2], "w9"]]
    assert np.allclose(embed_prompts(model, known), model.embed_text(seen), atol=1e-6)
    answers = model.generate(seen[::2], max_images=0, max_new_tokens=4, do_sample=False)
    assert answer_prompts(model, known[::2], max_new_tokens=4) == [str(answer).strip() for answer in answers]


values = st.lists(st.lists(st.floats(0, 100), max_size=3), min_size=1, max_size=8)


@settings(max_examples=25)
@given(values, st.integers(0, 99))
def test_intervals_are_within_the_values_and_depend_on_the_seed_alone(units, seed):
    sums, counts = Scores({"metric": [*units, [1.0]]}).sums()
    flat = [value for unit in units for value in unit] + [1.0]
    bounds = bootstrap_intervals(sums, counts, 50, seed)
    assert np.array_equal(bounds, bootstrap_intervals(sums, counts, 50, seed))
    assert min(flat) - 1e-9 <= bounds[0, 0] <= bounds[0, 1] <= max(flat) + 1e-9


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(0).normal(5.0, 2.0, (400, 1))
    low, high = bootstrap_intervals(values, np.ones_like(values))[0]
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.05)
    assert high == pytest.approx(values.mean() + error, abs=0.05)


@pytest.mark.slow
def test_two_processes_give_the_report_of_one(folder, tmp_path):
    # No launcher is needed to be two processes, only torch's store, here a file instead of a port.
    command = [sys.executable, "-m", "tests.evaluation.spread", str(folder), str(tmp_path)]
    running = [subprocess.Popen([*command, str(rank)], cwd=ROOT, stderr=subprocess.PIPE) for rank in range(2)]
    errors = [process.communicate()[1].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    one = evaluate(grounded(), Nearness(folder), batch_size=2, progress=False).to_json()
    assert [(tmp_path / f"report-{rank}.json").read_text() for rank in range(2)] == [one, one]
    shares = [json.loads((tmp_path / f"calls-{rank}.json").read_text()) for rank in range(2)]
    assert shares == [[[0, 1], [4, 5]], [[2, 3], [6]]]


@pytest.mark.slow
def test_an_evaluation_that_fails_in_one_process_ends_in_all(folder, tmp_path):
    command = [sys.executable, "-m", "tests.evaluation.spread", str(folder), str(tmp_path)]
    running = [subprocess.Popen([*command, str(rank), "fail"], cwd=ROOT, stderr=subprocess.PIPE) for rank in range(2)]
    errors = [process.communicate(timeout=300)[1].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    first, second = ((tmp_path / f"report-{rank}.json").read_text() for rank in range(2))
    assert first == "GroundingValueError: no more"
    assert second.startswith("GroundingStateError") and second.endswith("process 0: no more")
