"""Local data and a local model need no network, and ask nothing of one that is there."""

import json

import pytest
from conftest import ONE, flags, launch
from stand_in import StandIn


class Anybody(StandIn):
    """In the place of the Hub, and of the proxy to all others."""

    def respond(self, method, path, headers, body):
        return 404, {}, b""


@pytest.fixture
def anybody():
    made = Anybody()
    yield made
    made.close()


def test_a_run_on_local_files_asks_nobody_though_offline_was_not_said(base_flags, anybody, tmp_path):
    """It trains, is scored, and predicts. (test_recipes.py shows that what is of the Hub is asked for.)"""
    (tmp_path / "new.jsonl").write_text('{"text": "a great film"}\n')
    best = {"model_name_or_path": tmp_path / "run/best"}
    scored = {"dataset_name": base_flags["dataset_name"], "output_dir": tmp_path / "scored"}
    predicted = {"test_file": tmp_path / "new.jsonl", "output_dir": tmp_path / "predicted"}
    jobs = [("train", base_flags), ("eval", best | scored), ("eval", best | predicted)]
    (tmp_path / "jobs.json").write_text(json.dumps([(script, flags(**words)) for script, words in jobs]))
    done = launch(
        ONE, [str(tmp_path / "jobs.json")], script="tests/several.py", HF_HUB_OFFLINE="0",
        HF_ENDPOINT=anybody.url, HTTP_PROXY=anybody.url, HTTPS_PROXY=anybody.url, NO_PROXY="",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert anybody.requests == []
    assert (tmp_path / "scored/results.json").exists()
    assert (tmp_path / "predicted/predictions.jsonl").exists()
