"""push_to_hub against a stand-in for the Hub's endpoints: checked before the training, done after it."""

import base64
import hashlib
import json

import pytest
import yaml
from conftest import FORK, ONE, flags, launch, train_here, two_processes
from forks import ensure_server
from stand_in import StandIn

from ft.errors import UserError


class Hub(StandIn):
    """Takes one account's repositories: whoami, create, preupload, LFS objects, commit."""

    def __init__(self):
        self.objects, self.files, self.about, self.asked = {}, {}, None, None
        self.broken = self.closed = ()  # failing, so that a client retries, and forbidden
        self.is_private, self.may_write, self.deleted = (
            None,
            True,
            [],
        )  # for a repository that already exists
        super().__init__()

    def respond(self, method, path, headers, body):
        status, found = self.answer(method, path, body, headers)
        return status, {"Content-Type": "application/json"}, json.dumps(found).encode()

    def answer(self, method, path, body, headers):
        if any(word in path for word in self.broken):
            return 500, {"error": "out of order"}
        if any(word in path for word in self.closed):
            return 403, {"error": "not allowed"}
        if path.startswith("/objects/"):
            self.objects[path.rsplit("/", 1)[1]] = body
            return 200, {}
        if headers.get("Authorization") != "Bearer hf_secret":
            return 401, {"error": "no token"}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "ann", "orgs": []}
        if path == "/api/repos/create":
            asked = self.asked = json.loads(body)
            name = f"{asked.get('organization') or 'ann'}/{asked['name']}"
            return 200, {"url": f"{self.url}/{name}", "name": name, "id": name}
        if path.endswith("/auth-check/write"):
            return (200, {}) if self.may_write else (403, {"error": "you may not write here"})
        if method == "GET" and path.startswith("/api/models/ann/run") and self.is_private is not None:
            files = [{"type": "file", "path": name, "oid": "0", "size": 1} for name in self.files]
            about = {"id": "ann/run", "private": self.is_private, "siblings": []}
            return 200, files if "/tree/" in path else about
        if path == "/api/validate-yaml":
            card = json.loads(body)["content"]
            self.about = yaml.safe_load(card.split("---\n")[1])
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            return 200, {
                "files": [
                    {
                        "path": file["path"], "shouldIgnore": False,
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    }
                    for file in json.loads(body)["files"]
                ]
            }  # fmt: skip
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.url}/objects/{one['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "deletedFile":
                    self.deleted.append(value["path"])
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.objects[value["oid"]]
            return 200, {"commitUrl": f"{self.url}/ann/m/commit/{'0' * 40}", "commitOid": "0" * 40}
        return 404, {"error": f"{method} {path}"}


@pytest.fixture
def hub():
    made = Hub()
    yield made
    made.close()


@pytest.fixture
def pushed(hub, base_flags, monkeypatch):
    """Runs that push to the Hub: forks, unless the launcher matters."""

    def run(token="hf_secret", command=FORK, **values):
        ensure_server()  # before what follows, which must not affect the forks of other tests
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        words = {**base_flags, "max_train_steps": 2, "push_to_hub": "true", **values}
        script = "tests/at_hub.py" if command == FORK else "train.py"
        return launch(command, flags(**words), script=script)

    return run


def test_best_is_pushed_as_it_is(hub, pushed, tmp_path):
    done = pushed(command=ONE, hub_model_id="our-reviews")
    assert done.returncode == 0, done.stderr
    best = {path.name: path.read_bytes() for path in (tmp_path / "run/best").iterdir()}
    assert {name: hub.files.get(name) for name in best} == best
    assert hashlib.sha256(best["model.safetensors"]).hexdigest() in hub.objects
    assert hub.about == {"pipeline_tag": "text-classification", "library_name": "transformers"}
    assert "pushed best/ to http" in done.stdout
    # The account is checked before there is anything to lose.
    assert hub.requests[0].endswith("/api/whoami-v2") and hub.requests[1].endswith("/api/repos/create")
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in left if b"hf_secret" in path.read_bytes()]


def test_several_processes_push_once(hub, pushed):
    """The account's name, which the main process looks up, is not an option that all must share."""
    done = pushed(command=two_processes())
    assert done.returncode == 0, done.stderr
    assert {"model.safetensors", "config.json"} <= hub.files.keys()
    for once in ("/repos/create", "/commit/"):
        assert sum(once in request for request in hub.requests) == 1, once


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_is_private_where_it_is_asked_to_be(hub, pushed, private):
    hub.closed = ("/preupload/",)  # what follows is the same
    assert pushed(hub_private_repo=private).returncode == 2
    asked = hub.asked.get("visibility", hub.asked.get("private"))  # in newer versions, and in older ones
    assert hub.asked["name"] == "run" and asked in (("private", True) if private else ("public", False))


def test_a_token_that_the_hub_does_not_know_is_said_before_the_training(hub, pushed, tmp_path):
    done = pushed(token="hf_wrong")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: push_to_hub: {hub.url} does not take run: ")
    assert hub.requests == ["GET /api/whoami-v2"] and not (tmp_path / "run").exists()


def test_without_the_hub_it_is_said_before_the_training(base_flags, tmp_path):
    with pytest.raises(UserError, match=r"^push_to_hub: HF_HUB_OFFLINE is set"):
        train_here(**base_flags, push_to_hub="true")
    assert not (tmp_path / "run").exists()


def test_a_push_that_fails_loses_nothing_and_says_how_to_go_on(hub, pushed, tmp_path):
    hub.broken = ("/commit/",)
    done = pushed()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the run is finished" in done.stderr and "hf upload ann/run" in done.stderr
    assert (tmp_path / "run/results.json").exists() and (tmp_path / "run/best/config.json").exists()


def test_a_public_repository_that_is_there_is_not_taken_for_a_private_one(hub, pushed, tmp_path):
    hub.is_private = False
    done = pushed(hub_private_repo="true")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "hub_private_repo: found True, but ann/run is there already, and is public" in done.stderr
    assert not (tmp_path / "run").exists() and not hub.files


def test_an_account_that_may_not_write_is_told_before_the_training(hub, pushed, tmp_path):
    hub.may_write = False
    done = pushed()
    assert done.returncode == 2 and "does not take ann/run: " in done.stderr and "403" in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_was_pushed_before_is_not_loaded_in_the_place_of_the_model(hub, pushed):
    hub.is_private, hub.files = True, {"adapter_config.json": b"{}", "adapter/x": b"", "adapters/de": b""}
    done = pushed()
    assert done.returncode == 0, done.stderr
    assert sorted(hub.deleted) == ["adapter/x", "adapter_config.json"]


def test_a_hub_that_is_away_when_a_run_is_taken_up_is_asked_again_at_its_end(
    hub, pushed, base_flags, tmp_path
):
    words = {**base_flags, "save_strategy": "steps", "save_steps": 1}
    assert train_here(**words, max_train_steps=1) == 0
    hub.broken = ("/whoami",)
    done = pushed(**words, resume_from_checkpoint="latest")
    assert done.returncode == 2 and "warning: push_to_hub: " in done.stdout + done.stderr
    assert "trained 2 updates" in done.stdout and (tmp_path / "run/results.json").exists()


def test_the_config_of_a_run_does_not_name_the_repository_that_it_did_not_choose(hub, pushed, tmp_path):
    """Repeated in another folder, the run would push over this one."""
    assert pushed().returncode == 0
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["hub_model_id"] is None
